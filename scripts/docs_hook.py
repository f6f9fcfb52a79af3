"""Settings that mkdocs.yml cannot express: generated pages, and links that leave docs/."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def on_config(config):
    """List the decision records in the navigation."""
    records = sorted(f"adr/{path.name}" for path in (ROOT / "docs" / "adr").glob("*.md"))
    for section in config.nav:
        for entry in section.get("Project", []):
            if "Decisions" in entry:
                entry["Decisions"] = records
    return config


def on_files(files, config):
    """Add README.md and CHANGELOG.md as pages."""
    readme = (ROOT / "README.md").read_text().replace("(CHANGELOG.md)", "(docs/changes.md)")
    readme = re.sub(r"\]\(docs/adr/?\)", _first_decision, readme)
    readme = re.sub(r"\]\(docs/", "](", readme)
    files.append(File.generated(config, "index.md", content=readme))
    changes = (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "changes.md", content=changes))
    return files


def on_page_markdown(markdown, page, **_):
    """Replace links to files outside docs/, which the site does not hold, with their text."""
    markdown = markdown.replace("(../CHANGELOG.md)", "(changes.md)")
    markdown = re.sub(r"\]\(adr/?\)", _first_decision, markdown)
    outside = "../" * (page.file.src_uri.count("/") + 1)
    return _LINK.sub(lambda link: link[1] if link[2].startswith(outside) else link[0], markdown)


def _first_decision(_):
    first = min(path.name for path in (ROOT / "docs" / "adr").glob("*.md"))
    return f"](adr/{first})"
