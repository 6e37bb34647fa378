"""The prompts of the exactness tests: pieces of one text, of lengths around every edge."""

LENGTHS = (
    *(1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 100),
    *(127, 128, 129, 180, 200, 255, 256, 257, 300, 400, 499, 500),
)
FEW_LENGTHS = (1, 7, 16, 33, 64, 129, 260)  # for `make test`


def prompts_of(token_ids: list[int], lengths: tuple[int, ...]) -> list[list[int]]:
    """A piece of each length, none from the same place as another where there is room."""
    starts = [37 * length % (len(token_ids) - length + 1) for length in lengths]
    return [token_ids[s : s + length] for s, length in zip(starts, lengths, strict=True)]


TEXT = """\
The harbour of the small town lay under a thin fog when the first boats came home. Three men stood
on the pier and counted the lights: one, two, four, seven. "There should be nine," said the oldest
of them, who had fished these waters for forty-one years. Nobody answered. The bell of the church
rang six times, and a dog barked somewhere behind the market hall. Then, very slowly, the eighth
light appeared beyond the breakwater, and after it the ninth.

How do boats find their way in a fog? Before the age of satellites, sailors used three simple
tools: a compass, a clock, and a lead line. The compass gave the direction. The clock, together
with an estimate of the speed, gave the distance. The lead line, a rope with a heavy weight at its
end, gave the depth of the water and, if the weight was covered with wax, a sample of the ground.
Sand meant one place, mud another. With these three numbers and a good chart, a careful captain
could say where he was to within half a mile.

Mathematics makes the same idea precise. Suppose that a boat travels at 6 knots for 90 minutes.
Since 6 * 1.5 = 9, it has covered 9 nautical miles, which is about 16.7 kilometres. If the current
pushes it sideways at 0.5 knots, it will also have moved 0.75 miles to one side. The following
function computes the new position:

def dead_reckoning(x, y, speed, heading, hours):
    dx = speed * hours * math.sin(math.radians(heading))
    dy = speed * hours * math.cos(math.radians(heading))
    return x + dx, y + dy

A list of the tools and what they measure:
1. compass - direction (degrees)
2. clock - time (hours, minutes)
3. lead line - depth (fathoms)
4. log - speed (knots)

The capital of France is Paris, the capital of Italy is Rome, and the capital of Norway is Oslo.
All three lie on rivers or on the sea, because for most of history water was the cheapest road. A
horse can pull about one ton on a good street, but more than thirty tons on a canal. That is why
the great markets of the world grew where ships could reach them, and why the people of the small
town, when they speak of "the road", still mean the sea.

Question: Why did the men on the pier wait for nine lights?
Answer: Because nine boats had left the harbour in the evening, and every one of them carried
somebody's father, brother or son. When the last light had passed the breakwater, the oldest man
took off his cap, looked at it for a while, and put it on again. "Well," he said, "that is that."
Then they all went to help with the ropes.
"""
