"""The edges: wire formats in, domain objects down, chunks and errors back out as the wire wants them."""
