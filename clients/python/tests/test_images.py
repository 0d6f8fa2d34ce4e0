"""Every form of a picture reaches the server with the pixels that it has."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake import Fake
from PIL import Image, ImageOps

import spatialscore_client as sc
from spatialscore_client._proto import spatialscore as pb
from spatialscore_client.images import Encoded, PictureError, Source, source, sources

RANDOM = np.random.default_rng(20261123)
PIXELS = RANDOM.integers(0, 256, (2, 24, 40, 3), dtype=np.uint8)


def pixels_of(found: Source, codec: Any = "raw") -> Any:
    image = pb.Image()
    found.encode(codec).write(image)
    if image.WhichOneof("source") == "raw":
        return np.frombuffer(image.raw.rgb8, np.uint8).reshape(image.raw.height, image.raw.width, 3)
    return np.asarray(Image.open(io.BytesIO(image.encoded)).convert("RGB"))


def png(array: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_arrays_and_pillow_pictures_are_sent_as_they_are() -> None:
    forms = [
        PIXELS[0],
        np.asfortranarray(PIXELS[0]),
        np.ascontiguousarray(PIXELS[0][:, ::-1])[:, ::-1],
        Image.fromarray(PIXELS[0]),
    ]
    for form in forms:
        found = source(form)
        assert found.size == (40, 24)
        for codec in ("raw", "png"):
            assert np.array_equal(pixels_of(found, codec), PIXELS[0])
    assert [np.array_equal(pixels_of(found), PIXELS[n]) for n, found in enumerate(sources(PIXELS))] == [True, True]


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "LA", "1", "I;16"])
def test_other_modes_are_what_pillow_makes_of_them(mode: str) -> None:
    picture = Image.fromarray(PIXELS[0]).convert("RGB" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = Image.fromarray(PIXELS[0, :, :, 0].astype(np.uint16) * 257)
    assert np.array_equal(pixels_of(source(picture)), np.asarray(picture.convert("RGB")))


def as_the_server_reads(data: bytes) -> Any:
    """The pixels of a file as transformers has them: `load_image`, then `convert_to_rgb`."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    if picture.info.get("transparency") is not None:
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return np.asarray(picture)


def saved(picture: Any, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def turned(value: int, kind: int = 3) -> Any:
    exif = Image.Exif()
    exif[0x0112] = value
    if kind == 4:
        # As some phones write it: a LONG.
        return exif.tobytes().replace(b"\x12\x01\x03\0\x01\0\0\0", b"\x12\x01\x04\0\x01\0\0\0")
    return exif.tobytes()


RGB = Image.fromarray(PIXELS[0])
CLEAR = tuple(int(value) for value in PIXELS[0, 3, 5])
FILES = {
    **{f"jpeg{value}": saved(RGB, "JPEG", exif=turned(value)) for value in range(1, 10)},
    "jpeg_long": saved(RGB, "JPEG", exif=turned(6, kind=4)),
    "png_exif": saved(RGB, "PNG", exif=turned(5)),
    "webp_exif": saved(RGB, "WEBP", lossless=True, exif=turned(8)),
    "rgb_clear": saved(RGB, "PNG", transparency=CLEAR),
    "grey_clear": saved(RGB.convert("L"), "PNG", transparency=int(PIXELS[0, :, :, 0].min())),
    "palette_clear": saved(RGB.quantize(8), "PNG", transparency=3),
    "palette_alphas": saved(RGB.quantize(8), "PNG", transparency=bytes(range(0, 256, 32))),
    "rgba": saved(Image.fromarray(np.dstack([PIXELS[0], PIXELS[1, :, :, 0]])), "PNG"),
    "turned_and_clear": saved(RGB, "PNG", transparency=CLEAR, exif=turned(6)),
    "cmyk": saved(RGB.convert("CMYK"), "JPEG", exif=turned(3)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_picture_has_one_set_of_pixels_whichever_way_it_comes(name: str) -> None:
    data = FILES[name]
    expected = as_the_server_reads(data)
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(pixels_of(source(opened)), expected)
    assert np.array_equal(pixels_of(source(opened), "png"), expected)
    # What the caller holds is as it was.
    assert opened.getexif().get(0x0112) == Image.open(io.BytesIO(data)).getexif().get(0x0112)
    assert source(data).encode("raw") == Encoded(data, None)


def test_pictures_that_datasets_has_not_decoded(tmp_path: Path) -> None:
    data = png(PIXELS[0])
    file = tmp_path / "picture.png"
    file.write_bytes(data)
    held, lying = {"bytes": data, "path": "gone.png"}, {"bytes": None, "path": str(file)}
    for form in (held, lying, {"bytes": data, "path": None}):
        assert source(form).encode("jpeg") == Encoded(data, None)
    wrong_forms: list[dict[str, Any]] = [{}, {"bytes": None, "path": None}, {"bytes": data, "label": 3}]
    for wrong in (*wrong_forms, {"bytes": None, "path": "gone.png"}):
        with pytest.raises(PictureError):
            source(wrong)
    with pytest.raises(TypeError, match="put it in a list"):
        sources({"bytes": data, "path": None})


def test_files_and_encoded_bytes_go_untouched(tmp_path: Path) -> None:
    data = png(PIXELS[0])
    file = tmp_path / "picture.png"
    file.write_bytes(data)
    for form in (data, bytearray(data), memoryview(data), file, str(file)):
        assert source(form).encode("jpeg") == Encoded(data, None)


def test_jpeg_only_where_it_is_asked_for() -> None:
    sent = source(PIXELS[0]).encode("jpeg").data
    assert sent.startswith(b"\xff\xd8") and Image.open(io.BytesIO(sent)).size == (40, 24)


def broken_picture() -> Any:
    return Image.open(io.BytesIO(png(RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8))[:3000]))


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (PIXELS[0].astype(np.float32), "float32; give uint8"),
        (PIXELS[0, :, :, 0], r"\(24, 40\) of uint8"),
        (PIXELS[0].transpose(2, 0, 1), r"\(3, 24, 40\)"),
        (PIXELS[0, :0], r"\(0, 40, 3\)"),
        ("no/such/file.png", "there is no file"),
        (None, "is a NoneType"),
    ],
)
def test_what_cannot_be_sent_is_named(form: Any, text: str) -> None:
    with pytest.raises(PictureError, match=text):
        source(form)


def test_all_faults_are_told_together(fake: Fake) -> None:
    client = sc.SpatialScoreClient(fake.address, timeout=5)
    with pytest.raises(sc.ItemsFailedError) as caught:
        client.score("prompt", [PIXELS[0], None, "nowhere.png", PIXELS[1]])
    assert [failure.index for failure in caught.value.failures] == [1, 2]
    with pytest.raises(sc.ItemsFailedError, match="item 1: INVALID_ARGUMENT: cannot be decoded by Pillow"):
        client.score("prompt", [PIXELS[0], broken_picture()])
    client.close()
    assert not fake.requests


def test_tensors() -> None:
    torch = pytest.importorskip("torch")
    exact = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    floats = exact.float() / 255
    batches = [exact, floats, floats.double(), floats.half(), floats.bfloat16(), floats.requires_grad_()]
    for batch in batches:
        # bfloat16 has 8 bits of mantissa: the nearest of 256 steps it can name is at most half a step away.
        most = 1 if batch.dtype is torch.bfloat16 else 0
        for number, found in enumerate(sources(batch)):
            off = np.abs(pixels_of(found).astype(int) - PIXELS[number])
            assert off.max() <= most, batch.dtype
        assert np.array_equal(pixels_of(source(exact[0])), PIXELS[0])
    assert np.array_equal(pixels_of(source(list(floats.detach())[1])), PIXELS[1])
    # Rounded, not cut off: 0.999 of a step below is the step.
    almost = torch.full((3, 2, 2), (100 - 0.001) / 255)
    assert (pixels_of(source(almost)) == 100).all()


@pytest.mark.parametrize(
    ("scale", "text"),
    [(lambda x: x * 2 - 1, "from -1 to 1"), (lambda x: x * 255, "to 255"), (lambda x: x * float("nan"), "nan")],
)
def test_tensors_on_another_scale_are_refused(scale: Any, text: str) -> None:
    torch = pytest.importorskip("torch")
    wrong = scale(torch.linspace(0, 1, 48).reshape(3, 4, 4))
    with pytest.raises(PictureError, match=text):
        source(wrong)
    for shape in ((4, 4, 3), (1, 4, 4), (4, 4), (3, 0, 8), (3, 8, 0)):
        for kind in (torch.float32, torch.uint8):
            with pytest.raises(PictureError, match="give \\(3, height, width\\)"):
                source(torch.zeros(shape, dtype=kind))


def test_tensors_without_values_in_rows_are_refused() -> None:
    torch = pytest.importorskip("torch")
    dense = torch.full((2, 3, 4, 4), 0.5)
    for batch, text in (
        (dense.to("meta"), "meta device"),
        (dense.to_sparse(), "sparse_coo"),
        (dense.byte().to("meta"), "meta device"),
    ):
        with pytest.raises(PictureError, match=text):
            source(batch[0])
        found = sources(batch)
        assert [type(item) for item in found] == [PictureError, PictureError]


def run(script: str, *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


LOADED = "print(sorted({name.split('.')[0] for name in sys.modules} & set(sys.argv[2].split(','))))"
HEAVY = "numpy,PIL,torch,opentelemetry,flow_factory,unirl,trl,transformers,google.rpc"


def test_nothing_heavy_is_imported_for_those_who_do_not_use_it(fake: Fake) -> None:
    script = (
        "import asyncio, sys, spatialscore_client as sc\n"
        "client = sc.SpatialScoreClient(sys.argv[1], timeout=10)\n"
        "assert len(client.score('prompt', [b'\\0\\1'] * 3)) == 3\n"
        "assert len(list(client.score_stream(('prompt', b'\\0\\1') for _ in range(3)))) == 3\n"
        "asyncio.run(sc.AsyncSpatialScoreClient(sys.argv[1]).score('prompt', [b'\\0\\1']))\n"
        "import spatialscore_client.cli\n" + LOADED
    )
    assert run(script, fake.address, HEAVY) == "[]"


@pytest.mark.parametrize("adapter", ["plain", "flow_grpo", "trl"])
def test_an_adapter_imports_no_framework(adapter: str) -> None:
    script = f"import sys, spatialscore_client.adapters.{adapter}\n" + LOADED
    assert run(script, "", HEAVY) == "[]"


def test_it_lives_beside_others_that_bring_the_same_messages(fake: Fake) -> None:
    """googleapis-common-protos has a google/rpc/status.proto of its own, and so may the user's own stubs of ours."""
    script = (
        "import sys\n"
        "from google.protobuf import descriptor_pb2, descriptor_pool\n"
        "for path in ('google/rpc/status.proto', 'spatialscore/v1/spatialscore.proto'):\n"
        "    file = descriptor_pb2.FileDescriptorProto(name=path, package=path.split('/')[0] + '.other')\n"
        "    file.message_type.add(name='Status')\n"
        "    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())\n"
        "import spatialscore_client as sc\n"
        "print(len(sc.SpatialScoreClient(sys.argv[1], timeout=10).score('prompt', [b'\\0\\1'])))\n"
    )
    assert run(script, fake.address) == "1"
