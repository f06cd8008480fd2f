"""Rows for classification and translation: padded, labelled, weighed, and none cut without being asked."""

import json

import numpy as np
import pytest
from PIL import Image

from attnax.errors import InputError
from attnax.text import byte_tokenizer
from attnax.training import Batches, TextRows, image_folder, make_store, read_corpus


def make(tmp_path, rows):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_store(read_corpus(str(tmp_path / "a.jsonl")), byte_tokenizer(), tmp_path / "store", shard_tokens=20)


def ids(text):
    return byte_tokenizer().encode(text).tolist()


class TestTextRows:
    labelled = [{"text": "a" * (index % 5 + 1), "label": ["no", "yes"][index % 2]} for index in range(30)]

    def test_labelled_texts_are_padded_rows(self, tmp_path):
        store = make(tmp_path, self.labelled)
        rows = TextRows(store, length=6)
        assert store.classes == ("no", "yes") and len(rows) + len(TextRows(store, length=6, part="held_out")) == 30
        for index in range(len(rows)):
            source = self.labelled[int(store.name(index).split("#")[1]) - 1]
            tokens = rows[index]["tokens"]
            assert tokens.dtype == np.int32 and rows.padding == 0
            assert tokens.tolist() == ids(source["text"]) + [0] * (6 - len(source["text"]))
            assert store.classes[rows[index]["labels"]] == source["label"]
        batch = Batches(rows, batch_size=4, accumulate=2)[3]
        assert batch["tokens"].shape == (2, 4, 6) and batch["labels"].shape == (2, 4)
        assert batch["labels"].dtype == np.int32

    def test_pairs_have_weights_of_the_targets(self, tmp_path):
        store = make(tmp_path, [{"source": "abc", "target": "x" * (index % 3 + 1)} for index in range(9)])
        rows = TextRows(store, length=5, target_length=4)
        for index in range(len(rows)):
            row, size = rows[index], (int(store.name(index).split("#")[1]) - 1) % 3 + 1
            assert row["source"].tolist() == [*ids("abc"), 0, 0]
            assert row["target"].tolist() == [0, *ids("x" * size), 0, *[0] * (3 - size)]
            assert row["weights"].tolist() == [1.0] * (size + 1) + [0.0] * (3 - size)  # the end token counts
            assert row["weights"].dtype == np.float32
        assert {name: x.shape for name, x in Batches(rows, batch_size=2)[0].items()} == {
            "source": (1, 2, 5),
            "target": (1, 2, 5),
            "weights": (1, 2, 4),
        }

    def test_texts_alone_are_rows_too(self, tmp_path):
        rows = TextRows(make(tmp_path, [{"text": "ab"}, {"text": "abc"}]), length=5)
        assert list(rows[0]) == ["tokens"] and rows[0]["tokens"][0] == 0

    def test_a_row_that_is_too_long_is_named_unless_it_may_be_cut(self, tmp_path):
        rows = [*self.labelled, {"text": "b" * 9, "label": "no"}]
        store = make(tmp_path, rows)
        part = next(part for part in ("train", "held_out") if "a.jsonl#31" in names(store, part))
        words = r"must fit into a row of 4 tokens; got 9 in the tokens of a.jsonl#31 \(\d+ of \d+ do not fit\)"
        with pytest.raises(InputError, match=words):
            TextRows(store, length=4, part=part)
        cut = TextRows(store, length=4, part=part, truncate=True)
        assert cut[names(store, part).index("a.jsonl#31")]["tokens"].tolist() == ids("bbbb")

    def test_a_target_that_is_too_long_is_named(self, tmp_path):
        store = make(tmp_path, [{"source": "a", "target": "x" * 5} for _ in range(4)])
        with pytest.raises(InputError, match="must fit into a row of 6 tokens; got 7 in the target of a.jsonl"):
            TextRows(store, length=5)
        assert TextRows(store, length=5, target_length=6)[0]["weights"].tolist() == [1.0] * 6
        assert TextRows(store, length=5, truncate=True)[0]["weights"].tolist() == [1.0] * 5


def names(store, part):
    return [store.name(index, part) for index in range(store.num_documents(part))]


class TestImages:
    @pytest.fixture
    def folder(self, tmp_path):
        for number, name in enumerate(("cat", "dog/small", "dog/large", ".hidden")):
            (tmp_path / name).mkdir(parents=True)
            for index in range(2):
                pixels = np.full((4, 6, 3), 80 * number + index, np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / f"{index}.PNG")
        (tmp_path / "cat" / "notes.txt").write_text("no image")
        (tmp_path / "outside.png").write_bytes(b"in no class")
        return tmp_path

    def test_a_folder_is_a_class(self, folder):
        images = image_folder(folder, (3, 5))
        assert images.classes == ("cat", "dog") and len(images) == 6
        for index, path in enumerate(images.paths):
            row = images[index]
            assert row["images"].shape == (3, 5, 3) and row["images"].dtype == np.uint8
            expected = 80 * ["cat", "large", "small"].index(path.parent.name) + int(path.stem)
            expected += {"large": 80, "small": -80}.get(path.parent.name, 0)
            assert (row["images"] == expected).all() and images.classes[row["labels"]] in path.parts
        batch = Batches(images, batch_size=6)[0]
        assert batch["images"].shape == (1, 6, 3, 5, 3) and sorted(batch["labels"][0]) == [0, 0, 1, 1, 1, 1]

    def test_floats_and_grey(self, folder):
        image = image_folder(folder, 2, channels=1, dtype="float32")[1]["images"]
        assert image.shape == (2, 2, 1) and image.dtype == np.float32
        np.testing.assert_allclose(image, 1 / 255)

    def test_images_are_resized_whole(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            Image.fromarray(np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4)).save(tmp_path / name / "x.png")
        image = image_folder(tmp_path, 2, channels=1)[0]["images"][..., 0].astype(int)
        assert image.mean() == 120  # as the whole, of which a part would be lighter or darker
        assert image[0, 0] < image[0, 1] < image[1, 0] < image[1, 1]

    def test_what_is_no_folder_of_classes_is_refused(self, folder, unchecked_shapes):
        with pytest.raises(InputError, match="must hold a folder of images for each of at least two classes; got 0"):
            image_folder(folder / "cat", 3)
        with pytest.raises(InputError, match="no such folder"):
            image_folder(folder / "nowhere", 3)
        with pytest.raises(ValueError, match="size must be at least 1; got size=0"):
            image_folder(folder, 0)
        with pytest.raises(ValueError, match="channels must be 1 or 3; got channels=4"):
            image_folder(folder, 3, channels=4)
        with pytest.raises(ValueError, match="dtype must be uint8 or float32; got dtype='int8'"):
            image_folder(folder, 3, dtype="int8")
        (folder / "cat" / "0.PNG").write_text("no image")
        with pytest.raises(InputError, match=r"0.PNG is no image that Pillow can read"):
            image_folder(folder, 3)[0]
