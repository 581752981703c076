"""What several tests share: the real photos, and a small data folder written by hand."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# a shell's background jobs ignore interrupts, and their children with them; tests send some
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
WIKI = "http://commons.wikimedia.org/wiki/Category:"


@pytest.fixture(scope="session")
def photos() -> Path:
    """The folder with packages/ and landmarks/, real photos in GLDv2's layout."""
    folder = Path(os.environ.get("LANDMARK_DATA", "none"))  # scripts/test.sh sets it
    if not (ROOT / folder / "packages" / "train").is_dir():
        pytest.skip(f"no real photos in {folder}: LANDMARK_DATA names their folder")
    return ROOT / folder


@pytest.fixture(scope="session")
def continents() -> Path:
    """The table that says in which continent a country is."""
    return ROOT / "datasets_meta" / "continents.csv"


@pytest.fixture
def gldv2(tmp_path) -> Path:
    """A data folder in GLDv2's layout in which every rule of the lists has a case.

    Labels: 30 is 0, 10 is 1, 0020 is 2 (the clean ones); 99 is 3, None 4, 1e5 5, 20 6.
    """
    data = tmp_path / "data"
    text = {
        "train/train.csv": """\
id,url,landmark_id
aaaa000000000001,http://x/1.jpg,99
0000000000012345,"http://x/a,b.jpg",30
123456789012e345,http://x/3.jpg,10
aaaa000000000002,,10
aaaa000000000003,http://x/5.jpg,None
1234567890123456,http://x/6.jpg,0020
aaaa000000000004,http://x/7.jpg,99
aaaa000000000005,http://x/8.jpg,10
aaaa000000000006,http://x/9.jpg,30
aaaa000000000007,http://x/10.jpg,1e5
aaaa000000000008,http://x/11.jpg,20
""",  # ...5 stands under 10 here and under 30 in the clean list: trusted under 30 only
        "train/train_clean.csv": """\
landmark_id,images
30,aaaa000000000006 0000000000012345 aaaa000000000005
10,123456789012e345
0020,1234567890123456
""",
        "train/train_label_to_category.csv": f"""\
landmark_id,category
10,{WIKI}Ch%C3%A2teau_d%27If
30,"{WIKI}Marb%C3%A4cks_kyrka,_Sm%C3%A5land"
777,{WIKI}No_image_in_train
0020,{WIKI}Pont_Neuf
99,{WIKI}Pont_Neuf
None,{WIKI}NA
20,{WIKI}Lighthouse
""",
        "index/index.csv": """\
id
bbbb000000000001
bbbb000000000002
0000000000099999
bbbb000000000004
bbbb000000000005
bbbb000000000006
bbbb000000000007
bbbb000000000008
99999999e9999999
bbbb000000000009
""",
        "index/index_image_to_landmark.csv": """\
id,landmark_id
bbbb000000000009,12
99999999e9999999,10
bbbb000000000008,11
bbbb000000000007,9
bbbb000000000006,8
bbbb000000000004,7
0000000000099999,5
bbbb000000000002,30
bbbb000000000001,10
""",  # numbered differently from train; ...5 has no place, ...9 is no query's answer
        "index/index_label_to_category.csv": f"""\
landmark_id,category
10,"{WIKI}Marbäcks_kyrka,_Småland"
30,{WIKI}Château_d'If
5,{WIKI}Pont%20Neuf
7,{WIKI}Nowhere
8,{WIKI}NA
9,{WIKI}No_image_in_train
12,{WIKI}Lighthouse
""",  # 11 has no category
        "test/test.csv": """\
id
0000000000054321
cccc000000000001
cccc000000000003
cccc000000000004
cccc000000000005
cccc000000000006
""",
        "test/retrieval_solution_v2.1.csv": """\
id,images,Usage
cccc000000000004,None,Ignored
cccc000000000001,bbbb000000000002 bbbb000000000001 0000000000099999 bbbb000000000004,Private
cccc000000000003,bbbb000000000004,Private
0000000000054321,bbbb000000000006,Public
cccc00000000dead,bbbb000000000001,Private
cccc000000000006,99999999e9999999 dddd000000000000 bbbb000000000001,Public
cccc000000000005,bbbb000000000008,Ignored
""",  # ...dead is in no test list, dddd... in no index
    }
    for name, content in text.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(content, encoding="utf-8")
    members = {"FR": [10, 30, "0020"], "GB": [10, 4242], "NA": [99, "None"]}
    (data / "train" / "country").mkdir()
    for code, ids in members.items():
        rows = [{"id": landmark, "name": f"of {code}"} for landmark in ids]
        (data / "train" / "country" / f"{code}.json").write_text(json.dumps(rows))
    number = 0
    for split in ("train", "index", "test"):
        lines = (data / split / f"{split}.csv").read_text(encoding="utf-8").splitlines()
        for line in lines[1:]:
            name, number = line.split(",")[0], number + 1
            path = data / split / name[0] / name[1] / name[2] / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((8 + number, 50, 3), 9 * number, np.uint8)  # all different
            turned = Image.Exif()
            turned[0x0112] = 6 if number % 4 == 0 else 1
            Image.fromarray(pixels).save(path, exif=turned)
    (data / "train/a/a/a/aaaa000000000004.jpg").unlink()
    (data / "index/b/b/b/bbbb000000000008.jpg").write_bytes(b"")
    return data
