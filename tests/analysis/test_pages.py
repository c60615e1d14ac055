"""The page says what the attention says, escapes every text and needs nothing from elsewhere."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import accumulate
from pathlib import Path

import pytest
import runs
import torch

from hf_dskd import UserError
from hf_dskd.analysis import pages
from hf_dskd.analysis.heatmap import AlignmentExample, cross_attention, shares
from hf_dskd.analysis.pages import write_page


class Page(HTMLParser):
    """What is on a page: elements in order, and per section its texts (chunks of tokens), numbers and data."""

    VOID = ("meta", "br")

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.open, self.attributes, self.sections, self.texts = [], [], [], {}
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        kind = attributes.get("class")
        self.attributes.append((tag, attributes))
        if tag == "section":
            self.sections.append({"texts": [], "data": "", "numbers": "", "caption": ""})
        if kind == "tokens":
            self.sections[-1]["texts"].append([])
        if kind == "chunk":
            self.sections[-1]["texts"][-1].append([])
        if kind == "token":
            self.sections[-1]["texts"][-1][-1].append("")
        if tag not in self.VOID:
            self.open.append((tag, kind))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        inside = self.open[-1][0] if self.open else ""
        if ("span", "token") in self.open:
            self.sections[-1]["texts"][-1][-1][-1] += data
        elif inside == "script" and self.sections and ("section", None) in self.open:
            self.sections[-1]["data"] += data
        elif ("p", "numbers") in self.open:
            self.sections[-1]["numbers"] += data
        elif inside == "h2":
            self.sections[-1]["caption"] += data
        else:
            self.texts[inside] = self.texts.get(inside, "") + data


def example(student, teacher, caption="", t2s=None, s2t=None, **fields):
    """Of tokens without visible whitespace; uniform attention if none is given."""
    rows, columns = len(student), len(teacher)
    ends = (
        tuple(accumulate(len(token.encode("utf-8", "surrogatepass")) for token in side)) for side in (student, teacher)
    )
    return AlignmentExample(
        tuple(student),
        tuple(teacher),
        *ends,
        False,
        torch.full((rows, columns), 1 / columns) if t2s is None else torch.tensor(t2s),
        torch.full((columns, rows), 1 / rows) if s2t is None else torch.tensor(s2t),
        caption,
        **fields,
    )


def write(examples, tmp_path, title="A title"):
    write_page(examples, tmp_path / "folder" / "page.html", title)
    return Page(tmp_path / "folder" / "page.html")


# ---- Content


def test_page_of_a_run(tmp_path):
    run = runs.trainer(tmp_path, rows=4)
    shown = [cross_attention(run.distiller, row, f"row {place}") for place, row in enumerate(run.train_dataset)]
    page = write(shown, tmp_path)
    assert len(page.sections) == 4
    for section, one in zip(page.sections, shown):
        assert section["caption"] == one.caption
        student, teacher = section["texts"]
        assert tuple(token for chunk in student for token in chunk) == one.student_tokens
        assert tuple(token for chunk in teacher for token in chunk) == one.teacher_tokens
        # Chunk by chunk the same text, up to bytes of a character in pieces and the end-of-sequence token.
        assert len(student) == len(teacher)
        for left, right in list(zip(student, teacher))[:-1]:
            if "\\x" not in "".join(left + right):
                assert "".join(left) == "".join(right)
        data = json.loads(section["data"])
        for name in ("t2s", "s2t"):
            weights = torch.tensor(data[name])
            assert not weights.is_floating_point()
            torch.testing.assert_close(weights / 1000, getattr(one, name), atol=5.01e-4, rtol=0)
        assert all(f"{share:.1%}" in section["numbers"] for share in shares(one).values())
    top = max(float(weights.max()) for one in shown for weights in (one.t2s, one.s2t))
    [full] = [attributes["data-full"] for tag, attributes in page.attributes if tag == "body"]
    assert int(full) == pytest.approx(1000 * top, abs=0.501)
    assert f"full colour is {int(full) / 1000:.1%}" in page.texts["p"]


def test_chunks_by_hand(tmp_path):
    page = write([example(["Th", "e·c", "at"], ["The", "·c", "at"])], tmp_path)
    assert page.sections[0]["texts"] == [[["Th", "e·c"], ["at"]], [["The", "·c"], ["at"]]]
    given = example(["Th", "e·c", "at"], ["The", "·c", "at"], student_chunks=(0, 1, 1), teacher_chunks=(0, 0, 1))
    page = write([given], tmp_path)
    assert page.sections[0]["texts"] == [[["Th"], ["e·c", "at"]], [["The", "·c"], ["at"]]]
    assert page.sections[0]["caption"] == ""


def test_it_is_small_and_nothing_comes_from_elsewhere(tmp_path):
    page = write([example(["token"] * 100, ["token"] * 100)] * 4, tmp_path)
    text = (tmp_path / "folder" / "page.html").read_text(encoding="utf-8")
    assert len(text) < 350_000
    for reference in ("http:", "https:", "://", "src=", "url(", "@import", "fetch(", "import("):
        assert reference not in text
    assert {tag for tag, _ in page.attributes}.isdisjoint({"link", "img", "iframe", "object", "base"})
    assert not any(name in ("src", "href") for _, attributes in page.attributes for name in attributes)


# ---- Text


MEAN = ["<b>bold</b>", "</span></p></script><script>alert(1)</script>", "&amp;", "\"quoted'", "<!--", "東京"]
MEAN += ["👩👧", "naïve", "·", "↵", "a↵↵b", "\\x00"]


def test_markup_is_escaped(tmp_path):
    page = write([example(MEAN, MEAN[::-1], caption=MEAN[1])], tmp_path, title="<i>T</i> & </title>")
    assert page.texts["title"] == page.texts["h1"] == "<i>T</i> & </title>"
    [section] = page.sections
    assert section["caption"] == MEAN[1]
    assert [[token for chunk in text for token in chunk] for text in section["texts"]] == [MEAN, MEAN[::-1]]
    assert [tag for tag, _ in page.attributes].count("script") == 2
    assert {tag for tag, _ in page.attributes}.isdisjoint({"b"})


SHOWN = {
    "\x00\x1b": "\\x00\\x1b",
    "a\u202eb": "a\\u202eb",  # would turn around what follows
    "👩\u200d👧": "👩\u200d👧",
    "\u200d👧\u200c": "\\u200d👧\\u200c",
    "\u200d": "\\u200d",
    "\u0301": "◌\u0301",  # would sit on the token before
    "e\u0301": "e\u0301",
    "\ufe0f": "◌\ufe0f",
    "\u00a0\u3000\u2028": "\\xa0\\u3000\\u2028",
    "\ud83d": "\\ud83d",
    "\U000e0001": "\\U000e0001",
    "": "",
}


def test_any_character_can_be_shown(tmp_path):
    tokens = [*SHOWN, "z"]
    page = write([example(tokens, tokens, caption=token) for token in SHOWN], tmp_path, title="".join(SHOWN))
    for section, shown in zip(page.sections, SHOWN.values()):
        assert [chunk for text in section["texts"] for part in text for chunk in part] == [*SHOWN.values(), "z"] * 2
        assert section["caption"] == shown
    assert page.texts["title"].startswith("\\x00\\x1ba\\u202eb👩\u200d👧")


def test_line_breaks_break_the_line(tmp_path):
    write([example(["a↵", "↵↵", "b"], ["a", "↵↵↵", "b"])], tmp_path)
    text = (tmp_path / "folder" / "page.html").read_text(encoding="utf-8")
    assert text.count("<br>") == 3 and "<i>↵↵</i></span><br>" in text


# ---- The script


@pytest.fixture
def script():
    """Runs JavaScript after the page's own script, in a document that is empty if none is given."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node, which isn't installed")

    page = Path(pages.__file__).with_name("page.html").read_text()
    own = page.partition("\n<script>\n")[2].partition("</script>")[0]

    def run(code, document="const document = { querySelectorAll: () => [], body: { dataset: {} } };"):
        output = subprocess.run([node, "-e", document + own + code], capture_output=True, text=True, check=True)
        return json.loads(output.stdout)

    return run


def test_strongest_and_percent(script):
    assert script("console.log(JSON.stringify(strongest([10, 0, 300, 10, 680], 3)))") == [4, 2, 0]
    assert script("console.log(JSON.stringify(strongest([0, 1000, 0], 5)))") == [1]
    assert script("console.log(JSON.stringify([0, 5, 333, 1000].map(percent)))") == ["0.0%", "0.5%", "33.3%", "100.0%"]


# As much of a document as the script touches.
DOCUMENT = """
class Element {
  constructor(kind, children = [], text = "") {
    Object.assign(this, { kind, children, text, listeners: {}, weight: undefined });
    children.forEach(child => { child.parentNode = this; });
    const classes = new Set();
    this.classList = { add: name => classes.add(name), remove: (...names) => names.forEach(n => classes.delete(n)) };
    this.classes = classes;
    this.style = { setProperty: (_, value) => { this.weight = value; },
      removeProperty: () => { this.weight = undefined; } };
  }
  get textContent() { return this.text + this.children.map(c => c.textContent ?? c).join(""); }
  set textContent(value) { this.text = value; this.children = []; }
  append(...parts) { this.children.push(...parts); }
  replaceChildren(...parts) { this.children = parts; }
  closest(selector) { return "." + this.kind === selector ? this : null; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  focus() { focused = this; this.fire("focusin"); }
  fire(name, fields = {}) {
    for (let at = this; at; at = at.parentNode) {
      if (at.listeners[name]) at.listeners[name]({ target: this, preventDefault() {}, ...fields });
    }
  }
  querySelectorAll(selector) {
    return this.children.filter(child => child instanceof Element).flatMap(child =>
      (["." + child.kind, child.kind].includes(selector) ? [child] : []).concat(child.querySelectorAll(selector)));
  }
  querySelector(selector) { return this.querySelectorAll(selector)[0]; }
}
let focused;
const [chunksOf, data] = INPUT;
const sides = chunksOf.map(chunks => new Element("tokens", chunks.map(
  chunk => new Element("chunk", chunk.map(text => new Element("token", [], text))))));
const section = new Element("section", [...sides, new Element("readout"), new Element("script", [], data)]);
const document = { querySelectorAll: () => [section], body: { dataset: { full: "800" } },
  createElement: name => new Element(name) };
"""

ACTIONS = """
const tokens = sides.map(side => side.querySelectorAll(".token"));
const seen = [];
function note() {
  seen.push([tokens.map(side => side.map(token => token.weight ?? null)),
    tokens.map(side => side.map(token => [...token.classes].sort().join(" "))),
    section.querySelector(".readout").textContent]);
}
tokens[0][1].fire("pointerover"); note();
tokens[1][0].fire("click"); note();
tokens[0][0].focus();
focused.fire("keydown", { key: "ArrowLeft" });
focused.fire("keydown", { key: "End" }); note();
console.log(JSON.stringify([seen, tokens.map(side => side.map(token => token.tabIndex))]));
"""


def test_pointing_at_a_token(tmp_path, script):
    t2s = [[0.8, 0.2, 0.0], [0.1, 0.6, 0.3], [0.0, 0.5, 0.5]]
    s2t = [[0.4, 0.6, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]]
    page = write([example(["Th", "e·c", "at"], ["The", "·c", "at"], t2s=t2s, s2t=s2t)], tmp_path)
    [section] = page.sections
    document = DOCUMENT.replace("INPUT", json.dumps([section["texts"], section["data"]]))
    (hovered, tapped, moved), tab = script(ACTIONS, document)

    weights, classes, text = hovered
    assert weights == [[None] * 3, pytest.approx([0.1 / 0.8, 0.6 / 0.8, 0.3 / 0.8])]
    assert classes == [["", "active", ""], ["partner", "partner", ""]]
    assert text.startswith("student token 2 e·c attends") and "(in its chunk: 70.0%)" in text
    assert text.endswith("2 ·c 60.0%3 at 30.0%1 The 10.0%")

    weights, classes, text = tapped
    assert weights == [pytest.approx([0.4 / 0.8, 0.6 / 0.8, 0.0]), [None] * 3]
    assert classes == [["partner", "partner", ""], ["active", "", ""]]
    assert text.startswith("teacher token 1 The attends") and "(in its chunk: 100.0%)" in text
    assert text.endswith("2 e·c 60.0%1 Th 40.0%")

    weights, classes, text = moved
    assert weights == [[None] * 3, pytest.approx([0.0, 0.5 / 0.8, 0.5 / 0.8])]
    assert classes == [["", "", "active"], ["", "", "partner"]]
    assert text.endswith("2 ·c 50.0%3 at 50.0%")
    # One stop of the Tab key per text.
    assert tab == [[-1, -1, 0], [0, -1, -1]]


def test_no_examples(tmp_path):
    with pytest.raises(UserError, match="write_page got no examples"):
        write_page([], tmp_path / "page.html", "A title")
    assert not (tmp_path / "page.html").exists()
