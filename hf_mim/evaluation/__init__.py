"""How good the features are: one protocol, one file; each takes features or an encoder and returns a result."""
