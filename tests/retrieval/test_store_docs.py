import re
from pathlib import Path

import tiny

DOCS = Path(__file__).parents[2] / "docs"


def test_the_blocks_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.embedder().save_pretrained(Path("runs/emoji/model"))
    tiny.picture(0).save("a.png")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "store.md").read_text(), re.DOTALL)
    known: dict = {}
    told = None
    for block in blocks:
        exec(block, known)
        told = told or re.search(r"(.*)  # (\[\[.*\]\])", block)
    store = known["store"]
    assert len(store) == 4
    assert store.ids[-2:] == ["pear 1", "pear 2"]
    assert str(eval(told.group(1), known)).replace("'", '"') == told.group(2)
