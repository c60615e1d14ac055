"""What is shown is text: nothing in a run's files becomes markup."""

import base64
import html
import re

import pytest
from run_folders import FULL, NASTY, PNG, Checker, folder, written

from hf_dskd.report.document import Code, Heading, Listing, Paragraph, Pictures, Span, Table, html_text, markdown_text


@pytest.mark.parametrize(
    "text", [NASTY, "# no heading", "- no list", "1. no list", "---", "> no quote", "* x", "a_b_c"]
)
def test_text_is_no_markup(text, tmp_path):
    span = Span(text, "strong")
    visible = text.replace("\x00", "\\x00").replace("\ud800", "\\ud800")
    for block in (Heading(3, text), Paragraph(text), Paragraph(span), Code(text)):
        assert Checker(block.html(tmp_path)).text == visible
    assert Checker(Listing([text, (text, span)]).html(tmp_path)).text == visible * 3
    assert Checker(Table([text], [[text], [span]]).html(tmp_path)).text == visible * 3

    # Every character that could be markup has a backslash, but for underscores inside a word.
    markdown = markdown_text(text, tmp_path)
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*\[\]<>|~$&]", re.sub(r"\\[^\w\s]", "", markdown))
    assert re.sub(r"\\([^a-z0-9\s])", r"\1", markdown) == visible
    assert not re.match(r"#|- |---|>|\d+\. ", markdown)
    assert ("\\_" in markdown) == ("_it_" in text)
    table = Table(["a", "b"], [[text, text]]).markdown(tmp_path)
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()] == [3, 3, 3]


def test_code_keeps_its_text(tmp_path):
    text = "a\n````\n  </pre>```"
    assert Code(text).markdown(tmp_path) == f"`````text\n{text}\n`````"
    assert Code("a").markdown(tmp_path) == "```text\na\n```"
    spans = {"a`b": "`` a`b ``", "a|b": "`a\\|b`", "<a>": "`<a>`"}
    for content, expected in spans.items():
        assert markdown_text(Span(content, "code"), tmp_path) == expected
        assert html_text(Span(content, "code"), tmp_path) == f"<code>{html.escape(content)}</code>"
    assert markdown_text(("see ", Span("x", "code"), ", too"), tmp_path) == "see `x`, too"


def test_files_with_odd_names(tmp_path):
    path = tmp_path / 'a "b" (c)#&.png'
    path.write_bytes(PNG)
    link = Span("file", "link", path)
    assert markdown_text(link, tmp_path) == "[file](a%20%22b%22%20%28c%29%23%26.png)"
    assert Checker(html_text(link, tmp_path)).links == ["a%20%22b%22%20%28c%29%23%26.png"]
    pictures = Pictures({"<one>|": path, "two": path})
    assert Checker(pictures.html(tmp_path)).loads == ["data:image/png;base64," + base64.b64encode(PNG).decode()] * 2
    assert pictures.markdown(tmp_path).splitlines()[0] == "| \\<one\\>\\| | two |"


def test_a_folder_full_of_markup(tmp_path):
    samples = [{"step": 100, "prompt": NASTY, "reference": NASTY, "response": NASTY * 100}]
    nasty = {**FULL, "command": NASTY, "warnings": [NASTY], "changed_settings": {NASTY: [NASTY, {NASTY: NASTY}]}}
    nasty["models"] = {"student": NASTY, "teacher": NASTY}
    markdown, page = written(folder(tmp_path / "run", nasty, samples=samples))
    assert Checker(page).open == [] and "<script" not in page
    assert not re.search(r"(?<!\\)<script", re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL))
    assert page.count("…</pre>") == 1
