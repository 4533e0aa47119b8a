"""Nothing that is printed, written or published of an artifact of the profile `joint` takes its model for the original.

Every text is made by what makes it for people, from one tiny artifact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from certifying import QUICK, command
from certifying import small as small_certificate
from commands import done, run
from reporting import small
from tiny_conversion import RECIPE

from retrofit.artifact import folder as artifact
from retrofit.artifact.own import told
from retrofit.report.html.picture import picture
from retrofit.sharing.card import published_card

ALLOWED = (
    "neither is that of `",
    "its output is not that of the original: ",
    ", the original, it drifted: ",
)
"""What may be said of it: that it is another."""
ALONG = {"profile": "joint", "joint.weights": "full", "joint.lr": 1e-3}


def strings(value: Any) -> Iterator[str]:
    """All texts in a JSON document that are no keys."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from strings(one)
    elif isinstance(value, str):
        yield value


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory, flat: Path, texts: Path) -> dict[str, str]:
    """Text by where it stands."""
    place = tmp_path_factory.mktemp("said")
    folder, keys = place / "mine", {**RECIPE, **{k.replace("__", "."): v for k, v in QUICK.items()}, **ALONG}
    asked = [f"{key}={json.dumps(value)}" for key, value in {**keys, "data.source": str(texts)}.items()]
    found = {"convert": run("convert", flat, "-o", folder, "--offline", "--device", "cpu", *asked).output}
    found |= {"inspect": done("inspect", folder), "card": (folder / "README.md").read_text()}
    with pytest.MonkeyPatch.context() as patch:
        small_certificate(patch)
        found["certify"] = command(folder)[0].output
        report = small(patch, folder, out=place / "report", against=("lookup",))
    certificate = json.loads((folder / "certificate.json").read_text())
    found["certificate.json"] = "\n".join(strings(certificate))
    found |= {"report.md": report.markdown, "report.html": unescape(report.html), "report.svg": picture(report.data)}
    found["report.json"] = "\n".join(strings(report.data))
    config = artifact.read_config(folder)
    found["published card"] = published_card(found["card"], "me/mine", config, certificate)
    for form in ("peft", "transformers"):
        found[form] = run("export", folder, "--format", form, "-o", place / form, "--device", "cpu").output
        found[f"{form}, README.md"] = (place / form / "README.md").read_text()
    drift = told(config["drift"])
    assert all(drift in found[name] for name in ("convert", "inspect", "certify", "report.md", "report.html"))
    return {name: text.replace(drift, "") for name, text in found.items()}


def test_no_text_calls_its_model_the_original(rendered: dict[str, str]) -> None:
    for name, text in rendered.items():
        assert len(text) > 20, name
        rest = " ".join(text.split())
        for one in ALLOWED:
            rest = rest.replace(one, "")
        around = [rest[max(0, m.start() - 80) : m.end() + 40] for m in re.finditer(r"\boriginal\b|untouched", rest)]
        assert around == [], name
    assert "its own model does" in rendered["report.md"] and "the base against itself" in rendered["report.html"]


def test_lossless_is_said_of_its_own_ar_alone(rendered: dict[str, str]) -> None:
    assert "kind own: against its own `ar`, not that of" in rendered["certify"]
    assert "gives the output of its own `ar`" in rendered["published card"]
    assert "neither is that of" in rendered["card"]
