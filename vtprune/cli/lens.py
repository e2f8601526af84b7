# SPDX-License-Identifier: Apache-2.0
"""``vtprune lens``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import ConfigError
from . import common
from .common import DTYPES, app, open_image, quiet


@app.command("lens")
def look(
    image: Annotated[Path, typer.Argument(help="A picture: PNG, JPEG, WebP.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="A model that ships with vtprune, a checkpoint folder, or a hub name.")
    ] = "pocket-llava",
    layer: Annotated[
        int | None, typer.Option(help="Whose words are on the patches; 0: before the first layer.", show_default="last")
    ] = None,
    out: Annotated[Path, typer.Option(help="lens.png: a picture. lens.html: a page with all layers.")] = Path(
        "lens.png"
    ),
    calibration: Annotated[
        Path | None, typer.Option(help="Which tokens are sinks or dead.", show_default="the checkpoint's")
    ] = None,
    topk: Annotated[int, typer.Option(min=1, help="Words per patch and layer of a page.")] = 10,
    device: Annotated[str | None, typer.Option(help="For example cpu or cuda:0.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help=", ".join(DTYPES), show_default=False)] = None,
) -> None:
    """See what each visual token says: the word that it is nearest to, and whether it is sink, dead or alive."""
    paged = out.suffix.lower() in (".html", ".htm")
    if not paged and out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out} is neither a picture nor a page; name it .png or .html")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist; create it first")
    picture = open_image(image)
    if calibration is not None:
        from ..lens import Calibration

        Calibration.load(calibration)  # an unusable file is an error before the model is loaded
    with quiet(False) as say:
        say(f"loading {model}")
        net, processor = common.load(model, device, dtype)
        from .. import viz
        from ..lens.probe import check_layers, lens
        from ..models import find_family
        from ..models.loading import build_inputs

        family = find_family(net)
        shown = len(family.lm.layers) if layer is None else layer
        check_layers(family, shown)  # a page looks at all layers, and would not miss a wrong one until it is drawn
        inputs = build_inputs(net, processor, picture, "what is in the picture ?")
        say("looking")
        seen = lens(net, inputs, None if paged else shown, topk, processor, calibration)
        categories = seen.classes
        drawn = viz.seen_image(processor, inputs, picture)
        try:
            if paged:
                title = f"What {Path(model).name}'s visual tokens say about {image.name}"
                out.write_text(viz.lens_page(drawn, seen, shown, categories, title=title), encoding="utf-8")
            else:
                viz.lens(drawn, seen, shown, categories).save(out, format="PNG")
        except OSError as error:
            raise ConfigError(f"cannot write {out} ({error}); choose another path") from None
    console = Console(highlight=False)
    if categories is not None:
        parts = [f"{viz.words.NAMES.get(name, name)} {share:.1%}" for name, share in categories.shares().items()]
        console.print(f"{len(seen)} visual tokens: {', '.join(parts)}", markup=False)
    else:
        console.print(f"{len(seen)} visual tokens", markup=False)
        console.print("note: not classified:", seen.why, markup=False, soft_wrap=True)
    console.print(f"{'page' if paged else 'picture'}: {out}", markup=False)
