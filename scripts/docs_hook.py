"""What mkdocs can't say in its settings: the order of pages, and pages that stand outside docs/."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
ORDER = [
    "index.md",
    "api.md",
    "nn_handler.md",
    "async.md",
    "launchers.md",
    "convert.md",
    "troubleshooting.md",
    "performance.md",
    "scale.md",
    "format.md",
    "durability.md",
    "security.md",
    "architecture.md",
    "dependencies.md",
]
LAST = ["changes.md"]
DECISIONS = "adr/"
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files, config):
    """Add the README and the changes as pages, and put all pages in order: those that ORDER does
    not know come after those that it does, so that a new page needs no entry."""
    readme = (ROOT / "README.md").read_text().replace("(CHANGELOG.md)", "(docs/changes.md)")
    readme = re.sub(r"\(docs/adr/?\)", _first_decision, readme).replace("(docs/", "(")
    files.append(File.generated(config, "index.md", content=readme))
    changes = (ROOT / "CHANGELOG.md").read_text()
    files.append(File.generated(config, "changes.md", content=changes))
    pages = {file.src_uri for file in files.documentation_pages()}
    decisions = sorted(page for page in pages if page.startswith(DECISIONS))
    known = [page for page in ORDER if page in pages]
    new = sorted(pages - {*known, *decisions, *LAST})
    config.nav = [*known, *new, {"Decisions": decisions}, *LAST]
    return files


def on_page_markdown(markdown, page, **_):
    """Links that leave docs/ lead nowhere on the site: their text alone stays."""
    if page.file.src_uri == "architecture.md":
        markdown = re.sub(r"\(adr/?\)", _first_decision, markdown)
    return _LINK.sub(lambda link: link[1] if link[2].startswith("../") else link[0], markdown)


def _first_decision(_):
    first = min(path.name for path in (ROOT / "docs" / "adr").glob("*.md"))
    return f"(adr/{first})"
