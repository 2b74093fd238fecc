"""What a packed bundle says of itself: MONAI's metadata, the record of its weights, and its card."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..errors import BadInput

__all__ = [
    "NOT_STATED",
    "STATED",
    "classes_of",
    "fill_metadata",
    "lineage",
    "make_card",
    "output_channels",
    "public_record",
    "reached_metrics",
]

NOT_STATED = "not stated"
# What only the people who trained can say.
STATED = (
    *("name", "task", "description", "authors", "copyright", "data_source", "data_type", "intended_use", "references"),
    "changelog",
)
# What a record of weights may say outside; the rest is about the machine that trained.
_RECORD = ("stage", "run_id", "nnunet", "weights", "config", "entropy")
_SEGMENTATION = ("dice", "jaccard", "hd95", "asd")
_REGRESSION = ("mae", "rmse", "r2")
_UNITS = {"dice": "", "jaccard": "", "hd95": " [mm]", "asd": " [mm]"}
_OPTIONAL = ("highdicom",)  # for --dicom_seg
_DIRECTIONS = {"R": "right", "L": "left", "A": "anterior", "P": "posterior", "S": "superior", "I": "inferior"}
_HEADING = re.compile(r"^(#+ )", re.MULTILINE)
_OWN_VALUES = re.compile(r"The configs' own values are.*?plan\.json'\]\"`\.", re.DOTALL)


def classes_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The classes of a config's network by id: its ``labels``, or background and the one ``organ`` it names."""
    labels = config["labels"]
    return labels if config.get("organ") is None else {"0": labels["0"], "1": config["organ"]}


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A weights' record (``model.json``) and those of its parents, without addresses and files."""
    kept = {key: record[key] for key in _RECORD if key in record}
    parents = {role: public_record(parent) for role, parent in record.get("parents", {}).items()}
    return {**kept, "parents": parents}


def lineage(digest: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Stage and digest of weights, and of those they were made from."""
    stage = {"stage": record["stage"]} if "stage" in record else {}
    parents = {role: lineage(parent.get("weights", ""), parent) for role, parent in record.get("parents", {}).items()}
    return {**stage, "weights": digest, "parents": parents}


def reached_metrics(
    summary: Mapping[str, Any], labels: Mapping[str, str], targets: Sequence[Mapping[str, Any]], source: object
) -> dict[str, Any]:
    """An evaluation's means, flat: ``cases``, ``mean_dice``, ``dice/<label>``, ``hd95/<label>`` (mm) and so on.

    Args:
        summary: the content of a ``summary.json``.
        labels: label id to name.
        targets: the targets' descriptions.
        source: where the summary comes from, for errors.

    Raises:
        BadInput: it is no summary, or one of other classes or targets.
    """
    if not isinstance(summary.get("cases"), int) or not isinstance(summary.get("labels"), dict):
        raise BadInput(f"{source}: expected the summary.json that an evaluation wrote, with `cases` and `labels`.")
    for kind, found, own in (
        ("labels", set(summary["labels"]), {name for label, name in labels.items() if int(label) != 0}),
        ("targets", set(summary.get("targets", {})), {target["name"] for target in targets}),
    ):
        if not found <= own:
            raise BadInput(
                f"{source}, {kind}: found {', '.join(sorted(found - own))}, which the plan doesn't have; it has "
                f"{', '.join(sorted(own)) or 'none'}. Give the evaluation of these weights."
            )
    metrics: dict[str, Any] = {"cases": summary["cases"], "mean_dice": summary.get("mean_dice")}
    for name, figures in summary["labels"].items():
        metrics.update({f"{key}/{name}": figures.get(key, {}).get("mean") for key in _SEGMENTATION})
    for name, figures in summary.get("targets", {}).items():
        for group, prefix in (("voxels", ""), ("case_means", "case_means_"), ("cases", "")):
            if isinstance(figures.get(group), Mapping):
                metrics.update({f"{name}/{prefix}{key}": figures[group].get(key) for key in _REGRESSION})
    metrics = {
        key: round(value, 4)
        for key, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    return {**metrics, "note": summary["note"]} if "note" in summary else metrics


def output_channels(config: Mapping[str, Any], segments: bool, channels: int) -> dict[str, str]:
    """What each channel of the network's output is, by index: classes, then targets with their units.

    Args:
        config: a plain config with ``labels`` and perhaps ``targets``.
        segments: whether the network returns the classes.
        channels: how many channels it returns.

    Raises:
        BadInput: labels and targets don't account for the channels.
    """
    labels = [name for _, name in sorted(classes_of(config).items(), key=lambda item: int(item[0]))] if segments else []
    targets = [
        f"{target['name']} ({target['unit']})" if target.get("unit") else target["name"]
        for target in config.get("targets", ())
    ]
    for names in (labels + targets, labels + targets + [f"log-variance of {target}" for target in targets], labels):
        if len(names) == channels:
            return {str(index): name for index, name in enumerate(names)}
    raise BadInput(
        f"network_def: returns {channels} channels, while the config has {len(labels)} labels and {len(targets)} "
        "targets. Use the plan and the overlays of the training."
    )


def _installed(name: str) -> str | None:
    try:
        return version(name).split("+")[0]  # without +cpu and the like, which is about this machine
    except PackageNotFoundError:
        return None


def fill_metadata(
    template: Mapping[str, Any],
    config: Mapping[str, Any],
    channels: Mapping[str, str],
    *,
    number: str,
    metrics: Mapping[str, Any],
    origin: Mapping[str, Any],
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The bundle's ``metadata.json`` for these weights.

    Args:
        template: the metadata of the bundle in the checkout.
        config: the plain inference config.
        channels: names of the network's output channels by index.
        number: the version.
        metrics: what was reached, see :func:`reached_metrics`.
        origin: see :func:`lineage`.
        given: what the user says of the data and the authors; wins over the template.

    Raises:
        BadInput: ``given`` has a key that isn't the user's to say.
    """
    if unknown := set(given) - set(STATED):
        raise BadInput(
            f"metadata, {', '.join(sorted(unknown))}: is filled in here, or isn't known. What can be stated: "
            f"{', '.join(STATED)}."
        )
    intensity, patch = config["intensity"], config["patch_size"]
    # With a description a channel, the channels aren't all of one kind or range.
    is_ct = isinstance(intensity, Mapping) and intensity["kind"] == "ct"
    classes = ", ".join(f"{label} {name}" for label, name in classes_of(config).items())
    count = "one channel" if config["channels"] == 1 else f"{config['channels']} channels"
    # The packages that are named, in the versions that are here.
    packages = {name: _installed(name) or known for name, known in template["required_packages_version"].items()}
    optional = {name: found for name in _OPTIONAL if (found := _installed(name))}
    shape = {"spatial_shape": [f"{size}*n" for size in patch], "dtype": "float32", "is_patch_data": True}
    image = {
        "type": "image",
        "format": "hounsfield" if is_ct else "magnitude",
        "modality": "CT" if is_ct else "n/a",
        "num_channels": config["channels"],
        **shape,
        "value_range": [
            round((intensity[edge] - intensity["mean"]) / intensity["std"], 4) for edge in ("lower", "upper")
        ]
        if is_ct
        else [],
        "channel_def": {
            str(i): "image" if config["channels"] == 1 else f"image {i}" for i in range(config["channels"])
        },
        "spacing": config["spacing"],
        # The patient's directions in which the axes run, first axis first.
        "orientation": config["orientation"][: config["spatial_dims"]],
    }
    prediction = {
        "type": "image",
        "format": "segmentation",
        "num_channels": len(channels),
        **shape,
        "value_range": [],
        "channel_def": dict(channels),
    }
    changelog = given.get("changelog", template.get("changelog", {}))
    return {
        **template,
        "version": number,
        "monai_version": _installed("monai"),
        "pytorch_version": _installed("torch"),
        "numpy_version": _installed("numpy"),
        "required_packages_version": packages,
        **({"optional_packages_version": optional} if optional else {}),
        "data_source": NOT_STATED,
        "image_classes": f"{count}, {'CT in HU' if is_ct else 'each image normalised by itself'}",
        "label_classes": f"one channel: {classes}",
        "pred_classes": ", ".join(f"{index} {name}" for index, name in channels.items()),
        "eval_metrics": dict(metrics),
        "intended_use": "Research only; not a medical device.",
        "lineage": dict(origin),
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": prediction}},
        **given,
        "changelog": changelog if number in changelog else {**changelog, number: "packed with its weights"},
    }


def make_card(bundle: str, card: str, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The bundle's ``docs/README.md``: what these weights are, then the bundle's card with paths as they are here.

    Args:
        bundle: the bundle's name.
        card: its card in the checkout.
        metadata: see :func:`fill_metadata`.
        config: the plain inference config.
    """
    card = card.replace("Commands are run from the checkout's root.", "Commands are run from this bundle's folder.")
    card = _OWN_VALUES.sub("The plan of the training is merged into the configs; for other data make another.", card)
    card = card.replace(f"bundles/{bundle}/", "").replace("bundles/", "../").replace("`common.", "`scripts.common.")
    # The comments in code blocks, which start alike, are none here: the cards' blocks hold commands alone.
    card = _HEADING.sub(r"#\1", card)
    axes = metadata["network_data_format"]["inputs"]["image"]["orientation"]
    directions = ", ".join(_DIRECTIONS.get(letter, letter) for letter in axes)
    rows = [
        ("classes", ", ".join(f"{label} {name}" for label, name in classes_of(config).items())),
        *((f"measures {target['name']}", _measured(target)) for target in config.get("targets", ())),
        ("image", f"{config['spatial_dims']}D, {metadata['image_classes']}"),
        ("voxel size", " x ".join(f"{size:g}" for size in config["spacing"]) + " mm; others are resampled"),
        ("axes", f"run to {directions} ({axes}); others are brought to it"),
        ("crops", " x ".join(str(size) for size in config["patch_size"]) + " voxels"),
        ("data", metadata["data_source"]),
        *(("made from", text) for text in _ancestors(metadata["lineage"])),
    ]
    parts = [
        f"# {bundle} {metadata['version']}",
        metadata["description"],
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {text} |" for name, text in rows),
        "PyTorch, MONAI and the packages of `required_packages_version` in `configs/metadata.json` must be installed, "
        "for `--dicom_seg` highdicom, too; the code is here, in `scripts`. From any folder, with BUNDLE for this one:",
        "```\n"
        "python -m monai.bundle run --config_file BUNDLE/configs/inference.json --input SCANS --output_dir RESULTS\n"
        "cd BUNDLE && sha256sum --check --quiet checksums.sha256\n```",
        *_metrics_table(metadata["eval_metrics"], config),
        "Commands that begin with `python -m common` are the project's, few-labels-bundles.",
        card,
    ]
    return "\n\n".join(parts).rstrip() + "\n"


def _measured(target: Mapping[str, Any]) -> str:
    """What a target is, and what its training saw."""
    words = [target.get("kind", "dense"), target.get("unit") or "no unit"]
    if target.get("range"):
        words.append("trained on {:g} to {:g}".format(*target["range"]))
    return ", ".join(words)


def _ancestors(origin: Mapping[str, Any]) -> list[str]:
    lines = []
    for role, parent in origin.get("parents", {}).items():
        lines += [f"{role}, weights `{parent['weights'][:16]}`", *_ancestors(parent)]
    return lines


def _metrics_table(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    if not metrics:
        return []
    units = {target["name"]: target.get("unit", "") for target in config.get("targets", ())}
    lines = ["| measure | mean |", "|---|---:|"]
    for key, value in metrics.items():
        measure, _, name = key.partition("/")
        if key in ("cases", "note"):
            continue
        unit = f" [{units[measure]}]" if units.get(measure) and not name.endswith("r2") else _UNITS.get(measure, "")
        lines.append(f"| {measure.replace('_', ' ')} {name.replace('_', ' ')}{unit} | {value:g} |".replace("  ", " "))
    note = f" {metrics['note']}" if "note" in metrics else ""
    return [f"Reached on {metrics['cases']} cases.{note}", "\n".join(lines)]
