"""A run as one HTML page: loss and metrics by round, where the time went, replicas, settings. It needs no network.

python -m sparkdeep.tracking.report runs/digits/rounds.jsonl writes report.html beside it, with what result.json there says.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from sparkdeep.errors import DataError
from sparkdeep.tracking.charts import HEIGHT, WIDTH, Chart, Line, line_chart, seconds, short, stacked_bars
from sparkdeep.tracking.records import ReplicaRecord, RoundRecord, read_jsonl
from sparkdeep.versions import package_versions

__all__ = ["About", "main", "render", "write"]


@dataclass(frozen=True, kw_only=True)
class About:
    """What a report shows of a run beside its records; whatever is left out is not shown."""

    title: str = "Training run"
    """Shown on top."""
    status: str = ""
    """"done", "failed", or another word for how it ended."""
    error: str = ""
    """Why it ended, if it failed."""
    num_rounds: int | None = None
    """Seconds of the whole run."""
    rows: int | None = None
    """Training rows of all replicas together."""
    num_parameters: int | None = None
    """Number of trainable parameters."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Scores of the trained model on test rows."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings by name, as in `FitInfo.settings`."""
    versions: Mapping[str, str] | None = None
    """Versions by package; None: those of this process."""


_TEMPLATE: Final = "report.html.jinja"
_MOST_TABLE_ROWS: Final = 200
_MOST_REPLICA_LINES: Final = 8

_PARTS: Final = (
    ("compute", "compute", "compute_seconds", "local steps of the slowest replica"),
    ("exchange", "exchange", "exchange_seconds", "sending parameters out and updates in, and taking their mean"),
    ("outer", "outer step", "outer_seconds", "the driver's step on the mean"),
    ("stage", "opening stages", "stage_seconds", "starting a barrier stage and its replicas"),
    ("validation", "validation", "validation_seconds", "scoring the validation rows"),
    ("checkpoint", "checkpoints", "checkpoint_seconds", "collecting states and writing them"),
)
_OTHER: Final = ("other", "other", "", "what is none of these")


@dataclass(frozen=True, kw_only=True)
class _Part:
    color: str
    name: str
    what: str
    seconds: float
    share: float


def write(records: Iterable[RoundRecord], path: str | Path, about: About | None = None) -> None:
    """Write the report of a run.

    Args:
        records: its rounds, such as `model.history`; none is fine. If a round was run again, its last record counts.
        path: the HTML file; its folder must be there.
        about: what else is known of the run.
    """
    Path(path).write_text(render(records, about), encoding="utf-8")


def render(records: Iterable[RoundRecord], about: About | None = None) -> str:
    """The report as HTML text; see `write`."""
    from jinja2 import Environment, StrictUndefined

    about = about or About()
    rounds = [record for _, record in sorted({record.round: record for record in records}.items())]
    template = (files("sparkdeep.tracking") / _TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"short": short, "seconds": seconds}
    text: str = environment.from_string(template).render(
        about=about,
        tiles=_tiles(rounds, about),
        charts=_charts(rounds),
        parts=_parts(rounds),
        replicas=_replicas(rounds),
        hosts=_hosts(rounds),
        speeds=_speeds(rounds),
        incidents=_incidents(rounds),
        table=_table(rounds),
        settings={name: _plain(value) for name, value in about.settings.items() if not _is_unset(value)},
        unset=[name for name, value in about.settings.items() if _is_unset(value)],
        versions=package_versions() if about.versions is None else about.versions,
        width=WIDTH,
        height=HEIGHT,
    )
    return text


def _tiles(rounds: Sequence[RoundRecord], about: About) -> list[tuple[str, str]]:
    of = f" of {about.num_rounds}" if about.num_rounds and (not rounds or rounds[-1].round != about.num_rounds) else ""
    tiles = [(name, short(value)) for name, value in about.scores.items()]
    tiles.append(("rounds", f"{rounds[-1].round if rounds else 0}{of}"))
    if rounds:
        total_s = sum(record.seconds for record in rounds)
        rows = sum(record.rows for record in rounds)
        scored = [record for record in rounds if record.metrics]
        tiles += [("last loss", short(rounds[-1].loss))]
        tiles += [
            (f"validation {name}", short(value)) for name, value in (scored[-1].metrics if scored else {}).items()
        ]
        tiles += [("time in rounds", seconds(total_s)), ("rows a second", short(rows / total_s) if total_s else "0")]
    if about.rows is not None:
        tiles.append(("training rows", f"{about.rows:,}"))
    if about.num_parameters is not None:
        tiles.append(("parameters", f"{about.num_parameters:,}"))
    return tiles


def _charts(rounds: Sequence[RoundRecord]) -> list[Chart]:
    if not rounds:
        return []
    losses = [Line(name="training", color="c0", points=[(record.round, record.loss) for record in rounds])]
    names = list(dict.fromkeys(name for record in rounds for name in record.metrics))
    if "loss" in names:
        losses.append(Line(name="validation", color="c1", points=_scores(rounds, "loss")))
    others = [Line(name=name, color="c1", points=_scores(rounds, name)) for name in names if name != "loss"]
    return [
        line_chart("Loss", losses, shown=short),
        *(line_chart(f"Validation {line.name}", [line], shown=short) for line in others),
    ]


def _scores(rounds: Sequence[RoundRecord], name: str) -> list[tuple[float, float]]:
    return [(record.round, record.metrics[name]) for record in rounds if name in record.metrics]


def _spent(record: RoundRecord) -> list[float]:
    """Seconds of a round by part, the rest last."""
    parts = [_known(getattr(record, field)) for _, _, field, _ in _PARTS]
    return [*parts, max(0.0, _known(record.seconds) - sum(parts))]


def _parts(rounds: Sequence[RoundRecord]) -> dict[str, Any] | None:
    """The whole run by part, and a chart of it by round; None without any time."""
    spent = [_spent(record) for record in rounds]
    sums = [sum(column) for column in zip(*spent, strict=True)]
    if not sum(sums):
        return None
    parts = [
        _Part(color=color, name=name, what=what, seconds=value, share=value / sum(sums))
        for (color, name, _, what), value in zip([*_PARTS, _OTHER], sums, strict=True)
        if value > 0
    ]
    words = ", ".join(f"{part.name} {part.share:.0%}" for part in parts)
    chart = stacked_bars(
        "Seconds a round",
        [record.round for record in rounds],
        [(part[0], part[1], [row[i] for row in spent]) for i, part in enumerate([*_PARTS, _OTHER])],
        label=f"Seconds by round. Altogether {seconds(sum(sums))}: {words}.",
    )
    return {"all": parts, "words": words, "total": sum(sums), "chart": chart}


def _replicas(rounds: Sequence[RoundRecord]) -> list[dict[str, Any]]:
    """Each replica on each host that it ran on: rows a second of its own work, and what it waited for."""
    found: dict[tuple[int, str], list[tuple[ReplicaRecord, RoundRecord]]] = {}
    for record in rounds:
        for part in record.replicas:
            found.setdefault((part.replica, part.host), []).append((part, record))
    rows: list[dict[str, Any]] = []
    for (replica, host), parts in sorted(found.items()):
        compute_s = sum(part.compute_seconds for part, _ in parts)
        slowest_s = sum(record.compute_seconds for _, record in parts)
        rows.append(
            {
                "replica": replica,
                "host": host,
                "rows": sum(part.rows for part, _ in parts),
                "speed": sum(part.rows for part, _ in parts) / compute_s if compute_s else 0.0,
                "input": sum(part.input_seconds for part, _ in parts) / compute_s if compute_s else 0.0,
                "idle": max(0.0, 1 - compute_s / slowest_s) if slowest_s else 0.0,
            }
        )
    fastest = max((row["speed"] for row in rows), default=0.0)
    return [{**row, "bar": row["speed"] / fastest if fastest else 0.0} for row in rows]


def _hosts(rounds: Sequence[RoundRecord]) -> list[dict[str, Any]]:
    """The hosts' replicas together; nothing for a single host."""
    by_host: dict[str, list[dict[str, Any]]] = {}
    for row in _replicas(rounds):
        by_host.setdefault(row["host"], []).append(row)
    if len(by_host) < 2:
        return []
    hosts: list[dict[str, Any]] = [
        {
            "host": host,
            "replicas": len({row["replica"] for row in rows}),
            "rows": sum(row["rows"] for row in rows),
            "speed": sum(row["speed"] for row in rows),
        }
        for host, rows in sorted(by_host.items())
    ]
    fastest = max(host["speed"] for host in hosts)
    return [{**host, "bar": host["speed"] / fastest if fastest else 0.0} for host in hosts]


def _speeds(rounds: Sequence[RoundRecord]) -> Chart | None:
    """Rows a second of each replica by round; None if there are too many replicas to tell their lines apart."""
    replicas = sorted({part.replica for record in rounds for part in record.replicas})
    if not replicas or len(replicas) > _MOST_REPLICA_LINES:
        return None
    points: dict[int, list[tuple[float, float]]] = {replica: [] for replica in replicas}
    for record in rounds:
        for part in record.replicas:
            if part.compute_seconds > 0:
                points[part.replica].append((record.round, part.rows / part.compute_seconds))
    lines = [Line(name=f"replica {i}", color=f"c{i % 8}", points=points[i]) for i in replicas]
    return line_chart("Rows a second of local work", lines, shown=short)


def _incidents(rounds: Sequence[RoundRecord]) -> list[str]:
    told = [f"Round {record.round} took {record.retries + 1} attempts." for record in rounds if record.retries] + [
        f"Before round {record.round} the optimizer state of replica {', '.join(map(str, record.state_reset))} was lost."
        for record in rounds
        if record.state_reset
    ]
    return told if len(told) <= 20 else [*told[:20], f"And {len(told) - 20} more of the kind."]


def _table(rounds: Sequence[RoundRecord]) -> dict[str, Any]:
    every = math.ceil(len(rounds) / _MOST_TABLE_ROWS) or 1
    names = list(dict.fromkeys(name for record in rounds for name in record.metrics))
    kept = [record for i, record in enumerate(rounds) if i % every == 0 or i == len(rounds) - 1]
    return {"rows": kept, "every": every, "metrics": names}


def _plain(value: Any) -> str:
    """A setting as text; a partial and a module, which `identity.describe` takes apart, as the call that makes them."""
    match value:
        case str(text):
            return text
        case [str(name), [*args], {**keywords}] | [str(name), {**keywords}, str(), *args]:
            given = [*map(_plain, args), *(f"{key}={_plain(part)}" for key, part in keywords.items())]
            return f"{name}({', '.join(given)})"
    return json.dumps(value, default=str, ensure_ascii=False)


def _is_unset(value: Any) -> bool:
    return value is None or value in ([], {}, ())


def _known(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of a rounds.jsonl; returns the exit code, 2 for a file that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m sparkdeep.tracking.report", description=main.__doc__)
    parser.add_argument("rounds", type=Path, help="a rounds.jsonl, or the folder that holds it")
    parser.add_argument("-o", "--output", type=Path, help="the HTML file; default: report.html beside rounds.jsonl")
    parser.add_argument("--title", help="shown on top; default: the folder's name")
    arguments = parser.parse_args(argv)
    source = arguments.rounds / "rounds.jsonl" if arguments.rounds.is_dir() else arguments.rounds
    output = arguments.output or source.parent / "report.html"
    try:
        about = _about_beside(source)
        write(_read(source), output, replace(about, title=arguments.title or source.absolute().parent.name))
    except (DataError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{output}\n")
    return 0


def _read(source: Path) -> list[RoundRecord]:
    try:
        return read_jsonl(source)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{source} holds a line that is no round record ({error}): give a rounds.jsonl") from error


def _about_beside(source: Path) -> About:
    """The contents of the result.json beside the rounds; nothing if there is none."""
    result = source.with_name("result.json")
    if not result.is_file():
        return About(versions={})
    try:
        content = json.loads(result.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{result} is not JSON ({error}): remove it, or run the job again") from error
    if not isinstance(content, Mapping):
        raise DataError(f"{result} is no JSON object: remove it, or run the job again")
    failure = content.get("error") or {}
    known = {"status", "exit_code", "error", "resumable", "seconds", "rounds", "versions"}
    return About(
        status=str(content.get("status", "")),
        error=f"{failure.get('type', '')}: {failure.get('message', '')}" if failure else "",
        scores={k: v for k, v in content.items() if k not in known and isinstance(v, float)},
        versions=content.get("versions") or {},
    )


if __name__ == "__main__":
    sys.exit(main())
