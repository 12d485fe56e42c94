"""Reading images: every source gives the same rows, every kind of image the right pixels; bad ones are told."""

import io
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from training.image_data import (
    ImageDataArguments,
    ImageDataset,
    TooManyUnreadableError,
    UnreadableImageError,
    decode_image,
    decode_stream,
    describe_images,
    load_image_dataset,
)

COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


@pytest.fixture(autouse=True)
def _cache_in_a_temporary_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(colour, size=(8, 8)):
    return encode(Image.new("RGB", size, colour))


def decode(content, num_channels=3):
    return decode_image({"bytes": content, "path": "a.png"}, num_channels)


def pixels(content, num_channels=3):
    return np.asarray(decode(content, num_channels))


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)


def records(*contents, path=None):
    return [{"bytes": content, "path": path} for content in contents]


def write_folder(folder, per_class=2):
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            (folder / name / f"{i}.png").write_bytes(png(colour))


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def numbered(count, bad=()):
    """A table of `count` images, image i of the grey i, with no image at the rows `bad`."""
    contents = [b"no image" if i in bad else png((i % 256,) * 3, (2, 2)) for i in range(count)]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    return datasets.Dataset.from_dict(
        {"image": records(*contents), "label": [i % 2 for i in range(count)]}, features=datasets.Features(features)
    )


# ---- sources ----


def sources(folder):
    """Two blue and two red images in every form, in the same order."""
    contents = [png(COLOURS[name]) for name in ("blue", "blue", "red", "red")]
    names = ["blue", "blue", "red", "red"]
    write_folder(folder / "images")
    write_parquet(folder / "strings.parquet", image=records(*contents), label=names)
    write_parquet(folder / "bytes.parquet", image=contents, label=names)
    write_parquet(folder / "parts" / "train-0.parquet", image=records(*contents[:3]), label=names[:3])
    write_parquet(folder / "parts" / "train-1.parquet", image=records(*contents[3:]), label=names[3:])
    return ("images", "strings.parquet", "bytes.parquet", "parts")


def test_every_source_gives_the_same_rows(tmp_path):
    for source in sources(tmp_path):
        rows = load_image_dataset(str(tmp_path / source), "train", require_labels=True)
        assert rows.column_names == ["image", "label"], source
        assert rows.features["label"].names == ["blue", "red"], source
        items = list(ImageDataset(rows))
        assert [item["label"] for item in items] == [0, 0, 1, 1], source
        assert [item["image"].getpixel((0, 0)) for item in items] == [*[COLOURS["blue"]] * 2, *[COLOURS["red"]] * 2]


def test_streams_give_the_rows_of_tables(tmp_path):
    for source in [*(str(tmp_path / name) for name in sources(tmp_path)), "emoji"]:
        table = load_image_dataset(source, "train")
        stream = load_image_dataset(source, "train", streaming=True)
        if source.endswith("images") or source == "emoji":
            assert stream.features == table.features
        for row, item in zip(decode_stream(stream.take(20)), ImageDataset(table), strict=False):
            assert np.array_equal(row["image"], item["image"])
            assert row.get("label", item["label"]) == item["label"]


def test_streamed_images_are_not_encoded_again(tmp_path):
    """What datasets does to images when columns are renamed; JPEG would lose by it."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    content = encode(noise, "JPEG", quality=50)
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["a"])})
    table = pa.table({"photo": records(content), "kind": [0]}, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for streaming in (False, True):
        rows = load_image_dataset(
            str(tmp_path / "a.parquet"), "train", image_column="photo", label_column="kind", streaming=streaming
        )
        assert next(iter(rows)) == {"image": {"bytes": content, "path": None}, "label": 0}


def test_sample_is_split_by_emoji_and_has_no_image_twice():
    train, test = (load_image_dataset("emoji", split, require_labels=True) for split in ("train", "test"))
    assert len(train) + len(test) > 1800
    assert train.features == test.features
    assert train.features["label"].num_classes == 9
    decoded = [{item["image"].tobytes() for item in ImageDataset(rows)} for rows in (train, test)]
    assert not decoded[0] & decoded[1]
    assert 0.18 < len(test) / (len(train) + len(test)) < 0.22


def test_sample_keeps_its_transparency_in_the_file():
    rows = datasets.load_dataset("parquet", data_files="training/sample_data/emoji/test.parquet", split="train[:5]")
    assert {row["image"].mode for row in rows} == {"RGBA"}
    assert set(rows.features["label"].int2str(rows["label"][:])) == {"Smileys & Emotion"}
    assert decode(encode(rows[0]["image"])).getpixel((0, 0)) == (255, 255, 255)


def test_splits_and_slices(tmp_path):
    write_folder(tmp_path / "train", per_class=5)
    write_folder(tmp_path / "test", per_class=1)
    assert len(load_image_dataset(str(tmp_path), "train")) == 10
    assert len(load_image_dataset(str(tmp_path), "test")) == 2
    assert len(load_image_dataset(str(tmp_path), "train+test")) == 12
    parts = [load_image_dataset(str(tmp_path), f"train[{part}]") for part in (":80%", "80%:")]
    assert [len(part) for part in parts] == [8, 2]
    assert parts[1].features["label"].names == ["blue", "red"]


def test_images_without_class_folders_have_no_labels(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "splits" / split).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "splits" / split / f"{i}.png").write_bytes(png("red"))
    write_folder(tmp_path / "one_class")
    for file in (tmp_path / "one_class" / "blue").iterdir():
        file.rename(tmp_path / "one_class" / "red" / f"blue_{file.name}")
    for folder in ("splits", "splits/train", "one_class"):
        for streaming in (False, True):
            rows = load_image_dataset(str(tmp_path / folder), "train", streaming=streaming)
            assert list(rows.features) == ["image"]
        with pytest.raises(ValueError, match=r"no column 'label'.*each class into a folder of its own"):
            load_image_dataset(str(tmp_path / folder), "train", require_labels=True)


def test_other_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", photo=records(png("red")), kind=["x"], image=["no"], label=[7])
    rows = load_image_dataset(str(tmp_path / "a.parquet"), "train", image_column="photo", label_column="kind")
    assert rows.column_names == ["image", "label"]
    assert rows.features["label"].names == ["x"]


# ---- labels ----


def load_labels(tmp_path, labels, **options):
    write_parquet(tmp_path / "a.parquet", image=records(*[png("red")] * len(labels)), label=labels)
    return load_image_dataset(str(tmp_path / "a.parquet"), "train", **options)


def test_integers_are_classes_of_their_number(tmp_path):
    rows = load_labels(tmp_path, [2, 0, 2])
    assert rows.features["label"].names == ["0", "1", "2"]
    assert rows["label"][:] == [2, 0, 2]


def test_held_out_labels_are_numbered_as_the_training_data(tmp_path):
    rows = load_labels(tmp_path, ["cat", "ant"], class_names=["ant", "bee", "cat"])
    assert rows["label"][:] == [2, 0]
    assert load_labels(tmp_path, [1, 0], class_names=["ant", "bee"]).features["label"].names == ["ant", "bee"]
    reordered = load_image_dataset("emoji", "test", class_names=["more", *emoji_classes()[::-1]])
    original = load_image_dataset("emoji", "test")
    names = [rows.features["label"].int2str(rows["label"][:]) for rows in (reordered, original)]
    assert names[0] == names[1]
    with pytest.raises(ValueError, match=r"Row 1 of .* is of the class 'dog', which is none of the 2"):
        load_labels(tmp_path, ["ant", "dog"], class_names=["ant", "bee"])


def emoji_classes():
    return load_image_dataset("emoji", "train").features["label"].names


@pytest.mark.parametrize(
    ("labels", "options", "sentence"),
    [
        ([0, 1, 5], {"class_names": ["a", "b"]}, "Row 2 of .* has the label 5, outside the 2 classes 0 to 1"),
        ([0, -3, 1], {}, "Row 1 of .* has the label -3, outside"),
        ([0, -1, 1, None], {}, "no label in 2 rows, the first is row 1"),
        (["a", None], {}, "no label in 1 rows, the first is row 1"),
        ([-1, -1], {}, "has no labels, every one is null or -1"),
        ([0.5, 1.0], {}, r"labels of .* are Value\('float64'\): give classes as integers"),
    ],
)
def test_bad_labels_are_told_with_their_row(labels, options, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        load_labels(tmp_path, labels, require_labels=True, **options)


def test_unlabelled_rows_do_for_pretraining(tmp_path):
    for labels in ([-1, -1], [None, None], [[1], [2]]):
        assert load_labels(tmp_path, labels).column_names == ["image"]


def test_class_label_outside_its_names_is_told(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = pa.table({"image": records(png("red"), png("red")), "label": [0, 2]}, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"Row 1 of .* has the label 2, outside the 2 classes"):
        load_image_dataset(str(tmp_path / "a.parquet"), "train")
    stream = load_image_dataset(str(tmp_path / "a.parquet"), "train", streaming=True)
    with pytest.raises(ValueError, match=r"has the label 2, outside the 2 classes"):
        list(decode_stream(stream))


def test_stream_with_a_label_missing_is_told():
    rows = [{"image": {"bytes": png("red"), "path": f"{label}.png"}, "label": label} for label in (0, -1)]
    features = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a", "b"])}
    stream = datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"^-1\.png has the label -1, outside the 2 classes 0 to 1"):
        list(decode_stream(stream))


def test_no_labels_where_the_column_is_none(tmp_path):
    assert load_labels(tmp_path, [0, -7], label_column=None).column_names == ["image"]
    assert ImageDataArguments(label_column="none").label_column is None
    with pytest.raises(ValueError, match="--label_column is none"):
        load_labels(tmp_path, [0], label_column=None, require_labels=True)


def test_stream_of_strings_cannot_number_its_classes(tmp_path):
    assert list(load_labels(tmp_path, ["a", "b"], streaming=True).features) == ["image"]
    with pytest.raises(ValueError, match="without names of classes, from which a stream cannot number"):
        load_labels(tmp_path, ["a", "b"], streaming=True, require_labels=True)


# ---- bad sources ----


def test_bad_source_is_told(tmp_path):
    def refused(sentence, dataset, split="train", kind=ValueError, **options):
        with pytest.raises(kind, match=sentence):
            load_image_dataset(str(dataset), split, **options)

    write_parquet(tmp_path / "a.parquet", image=records(png("red")), number=[1])
    write_parquet(tmp_path / "none.parquet", image=pa.array([], pa.binary()))
    (tmp_path / "empty").mkdir()
    (tmp_path / "fake.parquet").write_bytes(b"no parquet at all")
    (tmp_path / "a.png").write_bytes(png("red"))
    refused("holds no data files: put images", tmp_path / "empty", kind=FileNotFoundError)
    refused("no data set of images", tmp_path / "a.png")
    for streaming in (False, True):
        refused("has no rows", tmp_path / "none.parquet", streaming=streaming)
        refused(r"fake\.parquet.* cannot be read", tmp_path / "fake.parquet", streaming=streaming)
        refused("holds .*int64.* where images are expected", tmp_path / "a.parquet", image_column="number")
        refused("no column 'photo', only image, number", tmp_path / "a.parquet", image_column="photo")
        refused("no column 'kind', only image, number", tmp_path / "a.parquet", label_column="kind")
        refused("only the split 'train', not 'test'", tmp_path / "a.parquet", "test", streaming=streaming)
        refused("splits 'train', 'test', not 'dev'", "emoji", "dev", streaming=streaming)
    refused("a slice, which a stream cannot give", "emoji", "train[:5%]", streaming=True)
    refused("'nothing.png'.*emoji.*Hub id", "nothing.png", kind=FileNotFoundError)
    refused("'owner/name'.*HF_HUB_OFFLINE is set.*emoji", "owner/name", kind=FileNotFoundError)


def test_samples_of_text_and_of_images_are_not_mixed_up():
    from training.text_data import load_text_dataset

    with pytest.raises(ValueError, match="'wikipedia_leads' is of text, not image: take emoji"):
        load_image_dataset("wikipedia_leads", "train")
    with pytest.raises(ValueError, match="'emoji' is of image, not text: take wikipedia_leads"):
        load_text_dataset("emoji", "train")


# ---- kinds of images ----


def test_transparency_becomes_white():
    red_glass = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert np.abs(pixels(encode(red_glass)) - np.array([255, 127, 127])).max() <= 1
    hidden = Image.new("RGBA", (4, 4), (1, 2, 3, 0))
    assert (pixels(encode(hidden)) == 255).all()
    assert (pixels(encode(hidden), num_channels=1) == 255).all()
    grey_glass = Image.new("LA", (4, 4), (0, 128))
    assert np.abs(pixels(encode(grey_glass), num_channels=1) - 127.0).max() <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 0, 0, 255])
    assert (pixels(encode(palette)) == [0, 0, 255]).all()
    assert (pixels(encode(palette, transparency=1)) == 255).all()


def test_cmyk_is_converted():
    assert np.abs(pixels(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")) - [255.0, 0, 0]).max() < 12


@pytest.mark.parametrize("num_channels", [1, 3])
def test_sixteen_bits_are_scaled_not_clipped(num_channels):
    ramp = np.linspace(0, 65535, 64).round().reshape(8, 8)
    expected = (ramp / 65535 * 255).round()
    for content in (
        encode(Image.fromarray(ramp.astype(np.uint16))),
        encode(Image.fromarray(ramp.astype(np.int32)), "TIFF"),
        encode(Image.fromarray(ramp.astype(np.float32)), "TIFF"),
        encode(Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF"),
        encode(Image.fromarray((ramp * 1000 - 5).astype(np.int32)), "TIFF"),
    ):
        read = pixels(content, num_channels).astype(float)
        assert np.abs((read if num_channels == 1 else read[..., 0]) - expected).max() <= 1
        assert read.shape == ((8, 8) if num_channels == 1 else (8, 8, 3))


def test_dark_images_stay_dark():
    """A range of values is that of the kind of image, not of the one image."""
    dark = np.full((4, 4), 257)
    assert (pixels(encode(Image.fromarray(dark.astype(np.uint16))), 1) == 1).all()
    assert (pixels(encode(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), 1) == 128).all()
    assert (pixels(encode(Image.fromarray(np.full((4, 4), -3, np.int32)), "TIFF"), 1) == 0).all()


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(pixels(content) - [255.0, 0, 0]).max() < 12, kind


def test_exif_orientation_is_applied():
    half = Image.new("RGB", (16, 8), "black")
    half.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    turned = decode(encode(half, "JPEG", exif=exif))
    assert turned.size == (8, 16)
    assert turned.getpixel((4, 2)) > (200, 200, 200)
    assert turned.getpixel((4, 13)) < (50, 50, 50)
    assert decode(encode(half, "JPEG", exif=b"Exif\0\0rubbish that is no TIFF header")).size == (16, 8)


def test_grey_and_colour():
    assert decode(png("red"), num_channels=1).mode == "L"
    assert (pixels(encode(Image.new("L", (4, 4), 7))) == 7).all()
    assert (pixels(encode(Image.new("1", (4, 4), 1)), 1) == 255).all()
    with pytest.raises(ValueError, match="num_channels = 4"):
        decode(png("red"), num_channels=4)


def test_unreadable_images_are_told_by_name(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    whole = {kind: encode(noise, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP")}
    bad = {
        "zero bytes": (b"", r"empty \(0 bytes\)"),
        "text": (b"<html>404</html>", "format is unknown"),
        "bomb": (encode(Image.new("1", (20000, 20000))), "decompression bomb"),
        "not finite": (encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "not finite"),
        "damaged": (whole["PNG"][:200] + b"\xff" * 500 + whole["PNG"][700:], ""),
    } | {f"short {kind}": (content[: len(content) // 2], "") for kind, content in whole.items()}
    for what, (content, reason) in bad.items():
        with pytest.raises(UnreadableImageError, match=rf"^{what}\.png cannot be read as an image: .*{reason}"):
            decode_image({"bytes": content, "path": f"{what}.png"}, 3)
    with pytest.raises(UnreadableImageError, match=r"gone\.png cannot be read as an image: there is no such file"):
        decode_image({"bytes": None, "path": str(tmp_path / "gone.png")}, 3)
    with pytest.raises(UnreadableImageError, match=r"without a name.*empty"):
        decode_image(None, 3)


# ---- data sets of decoded images ----


def test_the_next_readable_image_stands_in_for_an_unreadable_one():
    images = ImageDataset(numbered(300, bad=(7, 8, 299)), to_tensor)
    greys = [round(float(images[i]["pixel_values"].mean() * 255)) for i in (6, 7, 8, 9, 299, 7)]
    assert greys == [6, 9, 9, 9, 0, 9]
    assert images[8]["labels"] == 1  # of image 9
    assert images.skipped == ["row 7", "row 8", "row 299"]


def test_skipped_images_are_named_by_their_path(tmp_path, monkeypatch):
    write_folder(tmp_path / "photos", per_class=60)
    (tmp_path / "photos" / "blue" / "3.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    images = ImageDataset(load_image_dataset("photos", "train"), to_tensor)
    list(images)
    assert images.skipped == ["photos/blue/3.png"]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_share_what_was_skipped(start):
    images = ImageDataset(numbered(200, bad=(3, 150)), to_tensor)
    loader = DataLoader(images, batch_size=10, num_workers=2, multiprocessing_context=start)
    batches = [batch for _ in range(1 if start == "spawn" else 2) for batch in loader]
    assert batches[0]["pixel_values"].shape == (10, 3, 2, 2)
    assert batches[0]["labels"].dtype == torch.long
    assert images.skipped == ["row 3", "row 150"]


def test_more_than_one_in_a_hundred_stops():
    list(ImageDataset(numbered(200, bad=(0, 10)), to_tensor))
    images = ImageDataset(numbered(200, bad=(0, 10, 20)), to_tensor)
    sentence = r"^3 of 200 images cannot be read \(row 0, row 10, row 20\), more than one in a hundred.*last: row 20"
    with pytest.raises(TooManyUnreadableError, match=sentence):
        list(images)
    with pytest.raises(TooManyUnreadableError, match=sentence):
        list(DataLoader(ImageDataset(numbered(200, bad=(0, 10, 20)), to_tensor), num_workers=1, batch_size=10))


def test_data_set_survives_pickling():
    images = pickle.loads(pickle.dumps(ImageDataset(numbered(10), to_tensor)))
    assert torch.equal(images[4]["pixel_values"], torch.full((3, 2, 2), 4 / 255))


@pytest.mark.filterwarnings("ignore:Left out")
def test_stream_leaves_out_and_stops():
    stream = numbered(300, bad=(5, 7)).to_iterable_dataset()
    with pytest.warns(UserWarning, match="Left out: the image that was read as number 6 cannot be read"):
        rows = list(decode_stream(stream, to_tensor))
    greys = [round(float(row["pixel_values"].mean() * 255)) for row in rows]
    assert greys == [i % 256 for i in range(300) if i not in (5, 7)]
    damaged = numbered(1010, bad=(*range(20), 1000)).to_iterable_dataset()
    with (
        pytest.warns(UserWarning, match="Left out"),
        pytest.raises(TooManyUnreadableError, match=r"^21 of the first 1001 images cannot be read \(the image"),
    ):
        list(decode_stream(damaged, to_tensor))


def test_stream_goes_on_from_its_state():
    def stream():
        rows = numbered(60, bad=(5,)).to_iterable_dataset(num_shards=3)
        return decode_stream(rows.repeat(None).shuffle(seed=0, buffer_size=4), to_tensor)

    with pytest.warns(UserWarning, match="Left out"):
        whole = [float(row["pixel_values"].mean()) for row, _ in zip(stream(), range(100), strict=False)]
    assert len(set(whole[:59])) > 50
    assert whole != sorted(whole)
    with pytest.warns(UserWarning, match="Left out"):
        again = [float(row["pixel_values"].mean()) for row, _ in zip(stream(), range(100), strict=False)]
    assert again == whole


class MeanClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.seen = []

    def forward(self, pixel_values, labels=None):
        self.seen += pixel_values.mean((1, 2, 3)).tolist()
        logits = self.head(pixel_values.mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore:Left out")
def test_trainer_resumes_on_the_same_images(streaming, tmp_path):
    rows = numbered(128, bad=(5,))
    if streaming:
        images = decode_stream(rows.to_iterable_dataset().repeat(None).shuffle(seed=0, buffer_size=16), to_tensor)
    else:
        images = ImageDataset(rows, to_tensor)

    def seen(**resume):
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=8,
            save_steps=5,
            per_device_train_batch_size=8,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            accelerator_config={"dispatch_batches": False},
        )
        trainer = Trainer(MeanClassifier(), arguments, train_dataset=images)
        trainer.train(**resume)
        return trainer.model.seen

    whole = seen()
    assert len(whole) == 64
    assert seen(resume_from_checkpoint=str(tmp_path / "checkpoint-5")) == whole[40:]


# ---- what a run records ----


def test_description_of_the_sample():
    rows = load_image_dataset("emoji", "test")
    description = describe_images(rows, "emoji", "test")
    assert description["images"] == len(rows)
    assert description["classes"] == 9
    assert description["info"]["license"] == "apache-2.0"
    stream = describe_images(load_image_dataset("emoji", "test", streaming=True), "emoji", "test")
    assert stream["streaming"] is True
    assert "images" not in stream


def test_fingerprint_tells_contents_labels_and_order_apart(tmp_path):
    def fingerprint(contents, labels, names=("a", "b")):
        features = datasets.Features(
            {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=list(names))}
        )
        rows = datasets.Dataset.from_dict({"image": records(*contents), "label": labels}, features=features)
        prints = {
            describe_images(rows, str(tmp_path), "train")["fingerprint"],
            describe_images(rows.to_iterable_dataset(), str(tmp_path), "train")["fingerprint"],
            describe_images(rows.select([1, 0]).select([1, 0]), str(tmp_path), "train")["fingerprint"],
        }
        assert len(prints) == 1
        return prints.pop()

    one, two = b"x" * 5000, b"y" * 5000
    base = fingerprint([one, two], [0, 1])
    assert base == fingerprint([one, two], [0, 1])
    others = [
        fingerprint([two, one], [0, 1]),
        fingerprint([one, two], [0, 0]),
        fingerprint([one, two], [0, 1], ("a", "c")),
        fingerprint([one + b"x", two], [0, 1]),
        fingerprint([one[:-1] + b"z", two], [0, 1]),
    ]
    assert len({base, *others}) == 6


def test_fingerprint_of_a_folder_goes_with_the_folder(tmp_path):
    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b")

    def fingerprint(name):
        return describe_images(load_image_dataset(str(tmp_path / name), "train"), str(tmp_path / name), "train")

    first, second = fingerprint("a"), fingerprint("b")
    assert first["fingerprint"] == second["fingerprint"]
    (tmp_path / "b" / "red" / "0.png").write_bytes(png("red", (80, 80)))
    assert fingerprint("b")["fingerprint"] != first["fingerprint"]
