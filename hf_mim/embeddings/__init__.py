"""Features of whole collections as files (`embed.py`, `formats.py`), and what can be found in them (`search.py`)."""
