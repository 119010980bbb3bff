"""The demo: a page in the browser on which a checkpoint shows what it predicts and has learned.

`actions.py` is everything between the page's events and its pictures, `markup.py` makes them HTML and PNG, `page.py` is
the page, and `app.py` serves it. Only the last two know gradio, which the extra hf-mim[demo] installs.
"""

from hf_mim.demo.app import launch

__all__ = ["launch"]
