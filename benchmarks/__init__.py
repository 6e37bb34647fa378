"""Speed, measured: the paged engine beside an unpaged baseline, on the same requests."""
