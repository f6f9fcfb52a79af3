"""Draw every module of the package in the data flow of a save and a load: docs/assets/modules.svg.

Run it after a module was added, moved or renamed: `python scripts/module_diagram.py`.
tests/test_docs.py compares the file with the modules.
"""

from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "assets" / "modules.svg"
SAVE = {
    "flatten": "state/flatten state/markers state/module_state state/optimizer_state "
    "state/random_state state/sharded_array state/sharded_tensors state/wrapper_tensors "
    "state/file_groups state/refusals",
    "plan": "state/local_chunks plan/local_plan",
    "agree": "saving/agreement plan/state_merge plan/replica_assignment plan/shard_layout "
    "plan/save_plan plan/plan_cache",
    "stage": "saving/async_save saving/staging saving/staged_part state/snapshot",
    "write": "saving/rank_writer saving/shard_writer saving/incremental saving/replicas "
    "io/downloads",
    "commit": "saving/commit plan/consistency",
}
LOAD = {
    "place": "state/materialize",
    "read": "loading/shard_reader loading/sharing loading/uploads loading/lazy_tensor",
    "plan": "plan/read_plan plan/page_cache_policy plan/shared_reads plan/device_map",
    "match": "state/matching state/match_context state/mismatches state/saved_tree "
    "state/tensor_matching state/container_matching state/module_matching "
    "state/optimizer_matching state/derived state/name_filters",
    "open": "loading/agreement loading/memory_checkpoint",
}
PIPELINES = ("saving/pipeline", "loading/pipeline")
BESIDE = {"maintenance": "plan/file_ranges", "cli": "__main__"}
"""Modules that stand in the box of another folder, which alone uses them."""
ROWS = [
    [
        ("nn_handler", 4, 104),
        ("convert", 3, 118),
        ("cli", 1, 92),
        ("integrations", 1, 130),
        ("analysis", 1, 72),
    ],
    [
        ("top level: calls", 2, 90),
        ("integrations/dcp", 2, 76),
        ("maintenance", 3, 112),
        ("manager", 1, 90),
    ],
    [
        ("storage", 3, 84),
        ("coordination", 3, 92),
        ("format", 2, 108),
        ("io", 2, 86),
        ("top level: base", 2, 74),
    ],
]
"""Rows of boxes above and below the two pipelines: (folder, columns, width of a column)."""
FOLDERS = {
    "top level: calls": "__init__ api checkpoint transforms testing",
    "top level: base": "config logs reports torch_compat errors _version",
}
LINE, GAP, WIDTH = 13, 10, 1200
STYLE = (
    'text{font-family:system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;'
    "fill:#1a1a2e;font-size:10px}"
    ".t{font-size:12px;font-weight:600}.h{font-size:13px;font-weight:600;fill:#3949ab}"
    ".a{stroke:#3949ab;stroke-width:1.6;marker-end:url(#e)}"
)


def modules():
    """The modules of the package by folder: names without the folder."""
    found = {}
    for path in sorted((ROOT / "shardckpt").rglob("*.py")):
        if path.name != "__init__.py" or path.parent.name == "shardckpt":
            folder = str(path.parent.relative_to(ROOT / "shardckpt")).removeprefix(".")
            folder, _, below = folder.partition("/")
            if below == "dcp":
                folder, below = "integrations/dcp", ""
            found.setdefault(folder, []).append(f"{below}/{path.stem}".removeprefix("/"))
    return found


def boxes():
    """The names in each box: the stages of the pipelines, and folders."""
    stages = [*SAVE.values(), *LOAD.values(), *BESIDE.values(), *FOLDERS.values()]
    drawn = {name for text in stages for name in text.split()} | set(PIPELINES)
    found = {**FOLDERS, **{box: "" for row in ROWS for box, *_ in row if box not in FOLDERS}}
    names = {box: text.split() for box, text in found.items()}
    for folder, stems in modules().items():
        rest = [stem for stem in stems if (f"{folder}/{stem}" if folder else stem) not in drawn]
        if rest and folder not in names:
            raise SystemExit(f"add {folder}/{rest[0]} to a stage in scripts/module_diagram.py")
        if rest:
            names[folder] += rest
    for box, name in BESIDE.items():
        names[box].append(name)
    return names


def text(x, y, content, kind=""):
    return f'<text x="{x}" y="{y}"{kind and f" class={kind!r}"}>{escape(content)}</text>'.replace(
        "'", '"'
    )


def box(x, y, width, height, title, columns, fill):
    """A box with a title, and with columns of names, each at its distance from the left side."""
    area = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    yield f'<rect {area} rx="6" fill="{fill}" stroke="#3949ab"/>'
    yield text(x + 8, y + 17, title, "t")
    for left, names in columns:
        for row, name in enumerate(names):
            yield text(x + 8 + left, y + 33 + row * LINE, name)


def arrow(x1, y1, x2, y2):
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="a"/>'


def row_of_boxes(row, names, y):
    """A row of folders. Returns its lines, and the end of the row."""
    tall = max(-(-len(names[folder]) // columns) for folder, columns, _ in row)
    height, x, lines = 30 + tall * LINE, GAP, []
    for folder, count, width in row:
        deep = -(-len(names[folder]) // count)
        parts = [(column * width, names[folder][column * deep :][:deep]) for column in range(count)]
        lines += box(x, y, count * width + 10, height, folder, parts, "#f5f5f5")
        x += count * width + 10 + GAP
    return lines, y + height


def pipeline(stages, title, y, *, leftwards):
    """A pipeline between the state and the checkpoint. Returns its lines, and its end."""
    height = 30 + LINE * max(len(text.split()) for text in stages.values())
    state, lines = 74, [text(GAP, y + 14, title, "h")]
    y += 22
    wide = (WIDTH - 2 * GAP - state - GAP * len(stages)) // len(stages)
    lines += box(
        GAP,
        y,
        state,
        height,
        "state",
        [(0, ["tensors", "modules", "optimizers", "values"])],
        "#ffffff",
    )
    for number, (stage, names) in enumerate(stages.items()):
        x = GAP + state + GAP + number * (wide + GAP)
        lines += box(
            x, y, wide, height, stage, [(0, names.split())], "#e8f5e9" if leftwards else "#e8eaf6"
        )
        ends = (x, x - GAP + 1) if leftwards else (x - GAP, x - 1)
        lines.append(arrow(ends[0], y + 12, ends[1], y + 12))
    return lines, y + height


def drawing():
    """The SVG."""
    names, lines, y = boxes(), [], GAP
    for row in ROWS[:2]:
        added, end = row_of_boxes(row, names, y)
        lines += [*added, arrow(WIDTH // 2, end, WIDTH // 2, end + 13)]
        y = end + 14
    added, end = pipeline(SAVE, "Save, on every rank: saving/pipeline", y, leftwards=False)
    lines += added
    added, end = pipeline(
        LOAD, "Load, on any number of ranks: loading/pipeline", end + 8, leftwards=True
    )
    lines += [*added, text(GAP, end + 22, "All stages use these folders", "h")]
    added, end = row_of_boxes(ROWS[2], names, end + 30)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {end + GAP}" role="img" '
        f'aria-label="All modules in the data flow of save and load">\n<style>{STYLE}</style>\n'
        '<defs><marker id="e" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#3949ab"/></marker></defs>\n'
        f'<rect width="{WIDTH}" height="{end + GAP}" rx="8" fill="#ffffff"/>\n'
    )
    return head + "\n".join([*lines, *added]) + "\n</svg>\n"


if __name__ == "__main__":
    TARGET.write_text(drawing())
