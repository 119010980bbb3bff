"""Serve the page of the demo."""

import importlib.util
import os
import socket
from pathlib import Path

from hf_mim.checks import least
from hf_mim.data.decode import MAX_PIXELS_VARIABLE

LARGEST_FILE, LARGEST_IMAGE = "100mb", 50_000_000  # of an upload: bytes; pixels
HOST = "127.0.0.1"
SYSTEM_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def check_gradio():
    """Raise ImportError if the extra is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("demo needs gradio: pip install hf-mim[demo]")


def launch(
    checkpoint: str | Path,
    examples: str | None = None,
    where: str | None = None,
    image_size=None,
    bands=None,
    host: str | None = None,
    port: int | None = None,
    max_image_pixels: int | None = None,
):
    """Load a checkpoint and serve its page until ^C.

    Args:
        checkpoint, examples, where, image_size, bands: those of `Demo.load` (actions.py).
        host: the address to listen on; default: that of the variable GRADIO_SERVER_NAME, which a Space sets, or
            127.0.0.1.
        port: default: the first free one from 7860 on.
        max_image_pixels: larger images are refused; default: 50,000,000, or what HF_MIM_MAX_IMAGE_PIXELS says.

    Raises:
        ValueError: in one line, before anything is loaded, if the page cannot be served there.
        ImportError: the extra hf-mim[demo] is not installed.
    """
    check_gradio()
    least(1, max_image_pixels=max_image_pixels)
    if port is not None:
        check_free(host or HOST, port)
    if max_image_pixels is not None:
        os.environ[MAX_PIXELS_VARIABLE] = str(max_image_pixels)
    os.environ.setdefault(MAX_PIXELS_VARIABLE, str(LARGEST_IMAGE))
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
    from hf_mim.demo.actions import Demo
    from hf_mim.demo.page import build

    page = build(Demo.load(checkpoint, examples, where, image_size, bands))
    _, address, _ = serve(page, host, port)
    print(f"The demo is at {address} (^C ends it)", flush=True)
    page.block_thread()


def check_free(host: str, port: int):
    """Raise ValueError if no server can listen there."""
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"host and port must be free to listen on, and {host}:{port} is not: {error}") from error


def serve(page, host: str | None = None, port: int | None = None):
    """Start the server in a thread. Nothing is asked of any other machine, and no link leads in from outside."""
    import gradio as gr

    from hf_mim.demo.markup import CSS

    return page.queue(default_concurrency_limit=1).launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=LARGEST_FILE,
        footer_links=[],
        css=CSS,
        theme=gr.themes.Default(**SYSTEM_FONTS),
        prevent_thread_lock=True,
        quiet=True,
    )
