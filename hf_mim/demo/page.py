"""The page of the demo, made with gradio. It parses events, calls `actions.py`, and shows the answers."""

from collections.abc import Callable

import gradio as gr

from hf_mim.demo.actions import REFUSED, Demo, Picked, reason
from hf_mim.demo.markup import heading, hint, message

KEPT = 3600  # seconds for which an uploaded file stays on the disk
# Events wait for each other: there is one model, and torch uses the whole machine for it.
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
BRUSHES = {"one patch": 1, "3 × 3 patches": 3}
ABOUT = "Hide patches and see what the model predicts there. Click on a patch and see which others are like it."


def build(demo: Demo) -> gr.Blocks:
    """The page of a demo."""
    with gr.Blocks(title=demo.title, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
        Page(demo, blocks)
    return blocks


class Page:
    """What is on the page, and what happens.

    `picked` holds what a visitor looks at. An event changes it, and with it the two pictures that one can click on:
    `mask` and `patch`. The results (`prediction`, `features`, `nearest`) follow.
    """

    def __init__(self, demo: Demo, blocks: gr.Blocks):
        self.demo, self.picked, thumbnails = demo, gr.State(None), demo.thumbnails()
        gr.HTML(heading(demo.title, ABOUT))
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                self.upload = gr.File(label="Your image", height=140)
                self.note = gr.HTML(visible=False)
                with gr.Column(visible=bool(thumbnails)):
                    gr.HTML(hint("Or an example"))
                    fixed = dict(interactive=False, allow_preview=False, show_label=False, buttons=[], format="png")
                    self.examples = gr.Gallery(thumbnails, columns=4, elem_classes="mim-examples", **fixed)
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Hidden patches", visible=demo.has_task):
                    self.lay_out_task()
                with gr.Tab("Features"):
                    with gr.Row():
                        self.patch = clickable("Click on a patch", "patch")
                        with gr.Column(scale=2, min_width=240):
                            self.features = gr.HTML(min_height=120)
                with gr.Tab("Nearest", visible=demo.search is not None):
                    self.nearest = gr.HTML(min_height=120)
        self.react(blocks)

    def lay_out_task(self):
        with gr.Row():
            self.mask = clickable("What the encoder sees: click to hide patches, or to show them", "mask")
            with gr.Column(scale=2, min_width=240):
                self.brush = gr.Radio(list(BRUSHES), value=next(iter(BRUSHES)), label="A click changes")
                share = round(100 * self.demo.usual_share) if self.demo.has_task else 50
                self.share = gr.Slider(5, 95, share, step=1, label="Hidden patches (%)")
                self.at_random = gr.Button("Hide so many at random", variant="primary")
                self.drawn = gr.Button("Hide as in pretraining")
                self.cleared = gr.Button("Hide none")
        self.prediction = gr.HTML(min_height=120)

    def react(self, blocks: gr.Blocks):
        """Say what follows on each event."""
        demo, of_mask, of_patch = self.demo, [self.prediction], [self.features]
        everything = of_mask * demo.has_task + of_patch + [self.nearest] * (demo.search is not None)
        self.on(self.upload.upload, self.choose, [self.upload], everything)
        self.on(self.examples.select, self.choose_example, [], everything)
        if demo.examples:
            self.on(blocks.load, lambda: self.choose(demo.examples[0]), [], everything)
        share = self.changing(lambda picked, percent: demo.at_random(picked, percent / 100))
        self.on(self.at_random.click, share, [self.picked, self.share], of_mask)
        self.on(self.drawn.click, self.changing(demo.drawn), [self.picked], of_mask)
        self.on(self.cleared.click, self.changing(demo.cleared), [self.picked], of_mask)
        self.on(self.mask.select, self.paint, [self.picked, self.brush], of_mask, trigger_mode="multiple")
        self.on(self.patch.select, self.compare, [self.picked], of_patch)

    def on(self, event: Callable, handler: Callable, inputs: list, results: list[gr.HTML], **how):
        """After an event, `handler` changes what is looked at, and then each of the results follows."""
        changed = [self.picked, self.note, self.mask, self.patch, self.upload]
        done = event(handler, inputs, changed, **ONE_AT_A_TIME, **how)
        actions = {self.prediction: self.demo.prediction, self.features: self.demo.features}
        for result in results:
            done = done.then(actions.get(result, self.demo.nearest), self.picked, result, **ONE_AT_A_TIME)

    # Handlers: each returns a value for each part of the page that changes

    def choose(self, file: str | dict) -> dict:
        picked, note = self.demo.pick(file)
        told = self.noted(note) | {self.upload: None}  # ready for the next file
        if picked is None:
            return told
        masked = {self.mask: self.demo.mask_picture(picked)} if self.demo.has_task else {}
        return {self.picked: picked, self.patch: self.demo.patch_picture(picked)} | masked | told

    def choose_example(self, event: gr.SelectData) -> dict:
        return self.choose(self.demo.examples[event.index])

    def paint(self, picked: Picked | None, brush: str, event: gr.SelectData) -> dict:
        return self.changing(self.demo.painted)(picked, *event.index, BRUSHES[brush])

    def compare(self, picked: Picked | None, event: gr.SelectData) -> dict:
        return self.changing(self.demo.compared, self.patch, self.demo.patch_picture)(picked, *event.index)

    def noted(self, note: str) -> dict:
        """Show a message, or none."""
        return {self.note: gr.HTML(note, visible=bool(note))}

    def changing(self, change: Callable[..., Picked], place=None, draw: Callable | None = None) -> Callable[..., dict]:
        """A handler that changes what is looked at and draws it anew: by default the picture of the mask."""
        place, draw = place or self.mask, draw or self.demo.mask_picture

        def handler(picked: Picked | None, *values) -> dict:
            if picked is None:
                return self.noted(message("Choose an image first."))
            try:
                changed = change(picked, *values)
                return {self.picked: changed, place: draw(changed)}
            except REFUSED as error:
                return self.noted(message(reason(error, picked.image)))

        return handler


def clickable(text: str, name: str) -> gr.Image:
    """A picture below a line that says what a click does."""
    with gr.Column(scale=3, min_width=240):
        gr.HTML(hint(text))
        return gr.Image(elem_id=name, interactive=False, show_label=False, format="png", buttons=[])
