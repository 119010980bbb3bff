"""The demo: a page in the browser on which a checkpoint shows what it predicts and has learned.

`actions.py` is everything between the page's events and its pictures, `markup.py` makes them HTML and PNG, and `app.py`
is the page: it alone knows gradio, which the extra hf-mim[demo] installs.
"""

from hf_mim.demo.app import launch

__all__ = ["launch"]
