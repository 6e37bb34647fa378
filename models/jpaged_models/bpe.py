"""A tokenizer made from text: byte-level BPE (Sennrich et al., arXiv 1508.07909), as GPT-2's."""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jpaged_models.tokenizer import Tokenizer

END = "<|endoftext|>"  # id 0
NUM_BYTES = 256


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """The tokenizer with the `vocab_size` most useful tokens; any text can be encoded.

    Raises ValueError for a `vocab_size` that has no room for every byte and `END`.
    """
    if vocab_size <= NUM_BYTES:
        raise ValueError(
            f"vocab_size must be at least {NUM_BYTES + 1}, for every byte and one end, got "
            f"{vocab_size}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    end = backend.token_to_id(END)
    assert end is not None, "a special token has an id"
    return Tokenizer(backend=backend, bos_token_id=None, eos_token_ids=(end,), chat_template=None)
