"""Write what an evaluation found, and a case's numbers at inference.

The reference comes from the keys ``reference`` (label map) and ``reference_<target>`` (dense target) of the evaluator's
batch or output: the files as they are, loaded by ``load_references`` in the dataset's transforms; nothing reorients,
resamples or crops them. So every figure is formed on the grid the image came with.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from ..data.datalist import case_name
from ..errors import BadInput
from ..files import to_json, write_atomically
from ..metrics import (
    DISTANCE_METRICS,
    OVERLAP_METRICS,
    REGRESSION_METRICS,
    interval_scores,
    regression_metrics,
    segmentation_metrics,
    summarize_intervals,
    summarize_regression,
)
from ..targets import is_dense, structure_ids
from ..transforms.output import voxel_spacing
from .cases import array, case_file, case_meta, cases_of, gather_cases, is_main, mean_and_spread, number

__all__ = ["CaseJsonWriter", "EvaluationWriter"]

logger = logging.getLogger(__name__)

CONVENTIONS = {
    "hd95": "mm; the larger of the two directed 95th percentiles of the distances between surface voxels (MONAI)",
    "asd": "mm; mean distance between surface voxels, both directions together",
    "hd95_pooled": "mm; the 95th percentile of both directions' distances together (medpy)",
    "hd95_pooled_voxels": "the same in voxels: with a spacing of 1",
    "asd_voxels": "voxels; mean distance from the prediction's surface voxels to the reference's, not back (medpy)",
    "failed": "only one of prediction and reference holds the label: Dice and Jaccard 0, no distances",
    "absent": "neither holds the label: no figures",
}
_HIDDEN = ("failed", "covered", "interval_scores", "sum_absolute_error", "sum_squared_error", "sum_squared_deviation")


def _corners(tensor: MetaTensor) -> np.ndarray:
    size = [*tensor.shape[1:], *[1] * (4 - tensor.ndim)]
    corners = np.stack(np.meshgrid(*[(0, length - 1) for length in size], indexing="ij"), axis=-1).reshape(-1, 3)
    affine = np.asarray(tensor.affine, dtype=float)
    return corners @ affine[:3, :3].T + affine[:3, 3]


def _check_grid(case: str, key: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.shape[1:] != expected.shape[1:]:
        raise BadInput(
            f"case {case}: `{key}` has shape {tuple(found.shape[1:])}, the prediction {tuple(expected.shape[1:])}. "
            "Both must be on the image file's own grid: load the reference without reorienting or resampling it, and "
            "invert the prediction."
        )
    if not (isinstance(found, MetaTensor) and isinstance(expected, MetaTensor) and found.affine.shape == (4, 4)):
        return
    if expected.affine.shape != (4, 4):
        return
    apart = float(np.abs(_corners(found) - _corners(expected)).max())
    if apart > max(0.5 * min(voxel_spacing(expected)), 1e-3):
        raise BadInput(
            f"case {case}: `{key}` lies {apart:.3g} mm away from the prediction though the shapes agree: another "
            "orientation, origin or spacing in one header. Save image and reference with the same affine."
        )


class EvaluationWriter:
    """Compare each case with its reference; write ``metrics.csv`` and ``summary.json``.

    A handler for MONAI's evaluators whose batch and output are decollated lists of dicts. It reads, for each case:

    - ``segmentation``: the predicted label map (1, *spatial) on the image file's own grid; absent for a network that
      only regresses;
    - ``reference``: the label file as it is, (1, *spatial); needed where there is a segmentation;
    - ``<target>_pred`` and ``reference_<target>``: predicted map and file of a dense target. Its error is formed where
      the reference has a value (finite and not ``missing``) and, with a reference label map, inside the structure.
      ``coverage`` is the fraction of those voxels that the predicted segmentation gives to the structure, and the
      summary's ``covered`` has the figures of these alone. A measurement in the predicted mask has no value elsewhere,
      and not always there: ``<target>_measured`` (1, *spatial) says where it has. Its other voxels get the mean of the
      case's measured ones, so that all figures are of the same voxels whatever the method; 0 if there is none.
      With ``<target>_std``, how often its intervals hold the reference, see :mod:`common.metrics.intervals`;
    - ``<target>_case`` and ``reference_<target>`` (or ``<target>``): the two numbers of a case-level target;
    - ``annotated``, optional: the label ids that the reference knows; others get no figures;
    - ``entropy``, optional: how uncertain the segmentation is.

    The CSV has a row a case with columns such as ``dice/wall``, ``hd95/wall``, ``thickness/mae``; an empty field is a
    figure that does not exist. The summary has mean, standard deviation and number of cases of each column, the
    failures by case, and of each target the figures over all voxels and of the case means. At the end of the epoch the
    means go to ``engine.state.metrics`` (``mean_dice`` is the mean over the labels' means), so attach this handler
    before those that log metrics.

    Args:
        output_dir: folder of the two files.
        labels: label id (as a string) to name.
        targets: the targets' descriptions.
        selected_on: name of the cases by which the weights were chosen, when these are the same cases; the summary then
            says that its figures are flattering.

    Raises:
        BadInput: while it runs: a case without a reference, one on another grid, or with ids that are no labels.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        labels: Mapping[str, str],
        targets: Sequence[Mapping[str, Any]] = (),
        selected_on: str | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.labels = dict(labels)
        self.targets = list(targets)
        self.selected_on = selected_on
        self.rows: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Register at ``engine``: begin anew at each epoch, take every case, write at the epoch's end."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Forget the cases of an earlier run."""
        self.rows = []

    def add(self, engine: Engine) -> None:
        """Take the cases of one iteration."""
        for case in cases_of(engine):
            self.rows.append(self._evaluate(case))

    def _evaluate(self, case: Mapping[str, Any]) -> dict[str, Any]:
        file = case_file(case)
        row: dict[str, Any] = {"case": case_name(case_meta(case)), "file": file, "labels": {}, "targets": {}}
        segmentation, reference = case.get("segmentation"), case.get("reference")
        if segmentation is not None:
            if reference is None:
                raise BadInput(
                    f"case {row['case']}: no `reference` to compare with. An evaluation needs cases with a `label`, "
                    "loaded a second time under that key."
                )
            _check_grid(row["case"], "reference", reference, segmentation)
            self._check_ids(row["case"], reference)
            known = self.labels
            if case.get("annotated") is not None:
                annotated = {int(label) for label in np.asarray(case["annotated"], dtype=int).reshape(-1)}
                known = {label: name for label, name in self.labels.items() if int(label) in annotated}
            row["labels"] = segmentation_metrics(
                array(segmentation), array(reference), known, voxel_spacing(segmentation)
            )
        for target in self.targets:
            evaluate = self._evaluate_dense if is_dense(target) else self._evaluate_number
            result = evaluate(row["case"], target, case)
            if result is not None:
                row["targets"][target["name"]] = result
        if "entropy" in case:
            row["entropy"] = number(case["entropy"])
        return row

    def _check_ids(self, case: str, reference: torch.Tensor) -> None:
        found = np.unique(array(reference))
        unknown = found[~np.isin(found, [int(label) for label in self.labels])]
        if unknown.size:
            ids = ", ".join(f"{value:g}" for value in unknown[:5])
            raise BadInput(
                f"case {case}: the reference has the label ids {ids}, which are not in `labels` "
                f"{self.labels}. Correct the file, or evaluate with the labels that the weights were trained for."
            )

    @staticmethod
    def _evaluate_number(name: str, target: Mapping[str, Any], case: Mapping[str, Any]) -> dict[str, Any] | None:
        key = target["name"]
        predicted = number(case[f"{key}_case"])
        referred = number(case.get(f"reference_{key}", case.get(key)))
        if not math.isfinite(referred):
            return None
        return {"prediction": predicted, "reference": referred, "error": predicted - referred}

    @staticmethod
    def _evaluate_dense(name: str, target: Mapping[str, Any], case: Mapping[str, Any]) -> dict[str, Any] | None:
        key = target["name"]
        reference_map = case.get(f"reference_{key}")
        if reference_map is None:
            return None
        prediction_map = case[f"{key}_pred"]
        _check_grid(name, f"reference_{key}", reference_map, prediction_map)
        values, prediction = array(reference_map), array(prediction_map)
        mask = np.isfinite(values)
        missing = target.get("missing", 0)
        if missing is not None:
            mask &= values != missing
        structures = structure_ids(target)
        if structures and case.get("reference") is not None:
            mask &= np.isin(array(case["reference"]), structures)
        covered = mask
        if structures and case.get("segmentation") is not None:
            covered = mask & np.isin(array(case["segmentation"]), structures)
        if f"{key}_measured" in case:
            covered = covered & array(case[f"{key}_measured"]).astype(bool)
            if covered.any():
                prediction = np.where(covered, prediction, prediction[covered].mean())
        result: dict[str, Any] = regression_metrics(prediction, values, mask)
        if f"{key}_std" in case:
            result.update(interval_scores(prediction, array(case[f"{key}_std"]), values, mask))
        if covered is not mask and result["voxels"]:
            result["coverage"] = float(covered.sum() / mask.sum())
            result["covered"] = regression_metrics(prediction, values, covered)
        return result

    def _columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The figures of one case, by the name of their column."""
        columns: dict[str, Any] = {}
        for name, figures in row["labels"].items():
            columns.update({f"{key}/{name}": value for key, value in figures.items() if key not in _HIDDEN})
        for name, figures in row["targets"].items():
            columns.update({f"{name}/{key}": value for key, value in figures.items() if key not in _HIDDEN})
        if "entropy" in row:
            columns["entropy"] = row["entropy"]
        return columns

    def _summarize(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tables = [self._columns(row) for row in rows]
        names = [name for label, name in self.labels.items() if int(label) != 0]
        label_summaries: dict[str, dict[str, Any]] = {
            name: {
                **{
                    measure: mean_and_spread(table.get(f"{measure}/{name}", math.nan) for table in tables)
                    for measure in (*OVERLAP_METRICS, *DISTANCE_METRICS)
                },
                "failed": sum(bool(row["labels"].get(name, {}).get("failed")) for row in rows),
            }
            for name in names
            if any(name in row["labels"] for row in rows)
        }
        targets: dict[str, Any] = {}
        for target in self.targets:
            results = [row["targets"][target["name"]] for row in rows if target["name"] in row["targets"]]
            if is_dense(target):
                summary: dict[str, Any] = summarize_regression(results)
                with_interval = [result for result in results if "interval_scores" in result]
                if with_interval:
                    summary["interval"] = summarize_intervals(with_interval)
                coverage = [result["coverage"] for result in results if "coverage" in result]
                if coverage:
                    summary["coverage"] = mean_and_spread(coverage)
                    summary["covered"] = summarize_regression([r["covered"] for r in results if "covered" in r])
            else:
                predicted = np.array([result["prediction"] for result in results])
                pooled = regression_metrics(predicted, np.array([result["reference"] for result in results]))
                summary = {"cases": {**{key: pooled[key] for key in REGRESSION_METRICS}, "n": pooled["voxels"]}}
            targets[target["name"]] = {"unit": target.get("unit", ""), **summary}

        failures = [
            {
                "case": row["case"],
                "label": name,
                "reason": "prediction empty" if self._is_empty(figures) else "reference empty",
            }
            for row in rows
            for name, figures in row["labels"].items()
            if figures["failed"]
        ]
        summary = {"cases": len(rows), "labels": label_summaries, "targets": targets, "failures": failures}
        if label_summaries:
            dice = [values["dice"]["mean"] for values in label_summaries.values()]
            summary["mean_dice"] = mean_and_spread(dice)["mean"]
            summary["conventions"] = CONVENTIONS
        if any("entropy" in row for row in rows):
            summary["entropy"] = mean_and_spread(row.get("entropy", math.nan) for row in rows)
        if self.selected_on:
            summary["note"] = (
                f"The weights were chosen by their result on {self.selected_on}, the cases of this evaluation: the "
                "figures are flattering. Judge on cases that chose nothing."
            )
        return summary

    @staticmethod
    def _is_empty(figures: Mapping[str, Any]) -> bool:
        return not figures.get("volume_ml", figures.get("area_mm2"))

    @staticmethod
    def _metrics(summary: Mapping[str, Any]) -> dict[str, float]:
        """The summary's means, flat: what trackers log. Those that do not exist are left out."""
        metrics = {"mean_dice": summary.get("mean_dice", math.nan)}
        for name, figures in summary["labels"].items():
            metrics.update({f"{key}/{name}": value["mean"] for key, value in figures.items() if key != "failed"})
            metrics[f"failed/{name}"] = float(figures["failed"])
        for name, figures in summary["targets"].items():
            for group in ("voxels", "case_means", "cases"):
                prefix = f"{name}/{group}_" if group == "case_means" else f"{name}/"
                for key in REGRESSION_METRICS if group in figures else ():
                    metrics[f"{prefix}{key}"] = figures[group][key]
        return {key: value for key, value in metrics.items() if math.isfinite(value)}

    def _table(self, summary: Mapping[str, Any]) -> str:
        lines = [f"evaluation of {summary['cases']} cases"]
        if summary["labels"]:
            lines.append(f"  {'label':<20} {'Dice':>15} {'Jaccard':>15} {'HD95 mm':>15} {'ASD mm':>15} {'failed':>7}")
        for name, figures in summary["labels"].items():
            cells = [
                f"{figures[key]['mean']:.3f} +- {figures[key]['sd']:.3f}" for key in ("dice", "jaccard", "hd95", "asd")
            ]
            lines.append(f"  {name:<20} " + " ".join(f"{cell:>15}" for cell in cells) + f" {figures['failed']:>7}")
        for name, figures in summary["targets"].items():
            for group in ("voxels", "case_means", "cases"):
                if group in figures:
                    values = ", ".join(f"{key.upper()} {figures[group][key]:.3f}" for key in REGRESSION_METRICS)
                    unit = f" [{figures['unit']}]" if figures["unit"] else ""
                    lines.append(f"  {name}{unit}, {group.replace('_', ' ')} (n {figures[group]['n']}): {values}")
            if "interval" in figures:
                interval = figures["interval"]
                lines.append(
                    f"  {name}, intervals of {interval['level']:.0%} hold {interval['raw']:.1%} of the voxels as "
                    f"predicted, {interval['calibrated']:.1%} calibrated by the other cases; factor of the standard "
                    f"deviation {interval['factor']:.3f} (n {interval['n']})"
                )
        lines.extend(f"  failed: {item['case']}, {item['label']}: {item['reason']}" for item in summary["failures"])
        if "note" in summary:
            lines.append(f"  note: {summary['note']}")
        return "\n".join(lines)

    def _csv(self, rows: Sequence[Mapping[str, Any]]) -> str:
        tables = [self._columns(row) for row in rows]
        columns = list(dict.fromkeys(column for table in tables for column in table))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["case", *columns, "failed"])
        for row, table in zip(rows, tables, strict=True):
            fields = [table.get(column, math.nan) for column in columns]
            failed = ";".join(name for name, figures in row["labels"].items() if figures["failed"])
            writer.writerow([row["case"], *["" if math.isnan(field) else field for field in fields], failed])
        return text.getvalue()

    def write(self, engine: Engine) -> None:
        """Write both files, log the table and hand the means to ``engine.state.metrics``."""
        rows = sorted(gather_cases(self.rows), key=lambda row: row["case"])
        summary = self._summarize(rows)
        engine.state.metrics.update(self._metrics(summary))
        if not is_main():
            return
        write_atomically(self.output_dir / "metrics.csv", self._csv(rows))
        write_atomically(self.output_dir / "summary.json", to_json(summary))
        logger.info(self._table(summary))


class CaseJsonWriter:
    """Write the numbers of each case, ``result`` of the evaluator's output, to ``<case>.json``.

    Args:
        output_dir: folder of the files.
        result_key: where the numbers lie.
    """

    def __init__(self, output_dir: str | os.PathLike[str], result_key: str = "result") -> None:
        self.output_dir = Path(output_dir)
        self.result_key = result_key

    def attach(self, engine: Engine) -> None:
        """Register at ``engine``: write after every iteration, so that a run that is stopped keeps what it has."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        for case in cases_of(engine):
            write_atomically(self.output_dir / f"{case_name(case_meta(case))}.json", to_json(case[self.result_key]))
