"""What the conversion cost, as the artifact recorded it."""

from __future__ import annotations

from retrofit.report.setting import Data, Earlier, Setting, Skipped


def training(setting: Setting, earlier: Earlier) -> Data:
    """Seconds, steps and rows of training, and the size of what was added."""
    config = setting.engine.config
    recorded, parameters = config.get("training", {}), config.get("parameters", {})
    if not recorded:
        raise Skipped("the engine holds no record of its training")
    seconds = recorded.get("seconds")
    added = parameters.get("adapter", 0) + parameters.get("heads", 0)
    price = setting.price
    return {
        "steps": recorded.get("steps"),
        "seconds": seconds,
        "clean_rows": recorded.get("clean_rows"),
        "draft_rows": recorded.get("draft_rows"),
        "usd": None if price is None or seconds is None else round(price * seconds / 3600, 4),
        "added_parameters": added,
        "added_share_of_base": round(added / parameters["base"], 6) if parameters.get("base") else None,
    }
