"""What is shown is text: nothing in a run's files becomes markup."""

import base64
import re

import pytest
from run_folders import FULL, NASTY, PNG, Checker, folder, written

from hf_dskd.report.document import html_page
from hf_dskd.utils.markup import block, code, escaped, link, pictures, strong, table


pytestmark = pytest.mark.usefixtures("undrawn")


def page(markdown, folder, homes=()):
    """What the body of a page has below its title."""
    return html_page(f"# T\n\n{markdown}\n", folder, homes).partition("</nav>")[2].partition("</body>")[0]


def text(markdown, folder):
    return Checker(page(markdown, folder)).text.strip("\n")


# What would be markup at the beginning of a line, or anywhere.
LINES = ("# no heading", "- no list", "+ no", "1. no list", "2) no", "---", "===", "> no quote", "* x", "~~~")
WORDS = ("a_b_c", "__init__", "&amp; &lt;", "![x](y.png)", "<https://a.b>", "[a]: b", "\\", "`", "a | b")


@pytest.mark.parametrize("nasty", [NASTY, *LINES, *WORDS])
def test_text_is_no_markup(nasty, tmp_path):
    visible = nasty.replace("\x00", "\\x00").replace("\ud800", "\\ud800")
    for markdown in (escaped(nasty), strong(nasty), f"### {escaped(nasty)}", f"- {escaped(nasty)}", block(nasty)):
        assert text(markdown, tmp_path) == visible
    cells = Checker(page(table([nasty, "b"], [[nasty, strong(nasty)]]), tmp_path)).text.split("\n")
    assert [cell for cell in cells if cell] == [visible, "b", visible, visible]
    assert escaped(escaped(nasty)) == escaped(nasty), "what is Markdown is left as it is"


def test_code_keeps_its_text(tmp_path):
    nested = "a\n````\n  </pre>```"
    assert block(nested) == f"`````text\n{nested}\n`````" and text(block(nested), tmp_path) == nested
    for content in ("a`b", "`", "a|b", "<a>", "a\\"):
        assert text(f"see {code(content)}, too", tmp_path) == f"see {content}, too"


def test_files_with_odd_names(tmp_path):
    path = tmp_path / 'a "b" (c)#&.png'
    path.write_bytes(PNG)
    linked = link("file", path, tmp_path)
    assert linked == "[file](a%20%22b%22%20%28c%29%23%26.png)"
    assert Checker(page(linked, tmp_path)).links == ["a%20%22b%22%20%28c%29%23%26.png"]
    shown = pictures({"<one>|": path, "two": path}, tmp_path)
    assert shown.splitlines()[0] == "| \\<one\\>\\| | two |"
    found = Checker(page(shown, tmp_path))
    assert found.loads == ["data:image/png;base64," + base64.b64encode(PNG).decode()] * 2
    assert re.findall("[^\n]+", found.text) == ["<one>|", "two"]


def test_only_pictures_of_the_run_are_looked_at(tmp_path):
    for name in ("report", "run", "else"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(PNG)
    (tmp_path / "run" / "secret.txt").write_text("s")
    (tmp_path / "run" / "link.png").symlink_to(tmp_path / "else" / "x.png")
    named = ("x.png", "../run/x.png", "../else/x.png", "../run/secret.txt", "../run/link.png", "http://a.b/x.png")
    found = Checker(page("\n\n".join(f"![{name}]({name})" for name in named), tmp_path / "report", [tmp_path / "run"]))
    assert len(found.loads) == 2 and all(name in found.text for name in named)


def test_a_folder_full_of_markup(tmp_path):
    samples = [{"step": 100, "prompt": NASTY, "reference": NASTY, "response": NASTY * 100}]
    nasty = {**FULL, "command": NASTY, "changed_settings": {NASTY: [NASTY, {NASTY: NASTY}]}}
    nasty["models"] = {"student": NASTY, "teacher": NASTY}
    run = folder(tmp_path / "run", nasty, samples=samples)
    (run / "evaluation").mkdir()
    (run / "evaluation" / "table.md").write_text("<script>\n\n| a |\n|---|\n| <script> |\n")
    markdown, html = written(run)
    assert Checker(html).open == [] and "<script" not in html and html.count("&lt;script&gt;") > 9
    own = markdown.partition("## Scores")[0]
    assert not re.search(r"(?<!\\)<script", re.sub(r"^(`{3,}).*?^\1$", "", own, flags=re.MULTILINE | re.DOTALL))
    assert html.count("…</pre>") == 1
