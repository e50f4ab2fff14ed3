"""What people give to eval: each input that cannot be meant is named with its file, line and a way out."""

import json
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from eval.__main__ import main
from eval.generate.prompts import load_prompts
from eval.generate.settings import Setting
from eval.metrics.extractors import load_extractor, read_pictures
from tests import tiny

# Prompts


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


TABLES = {
    "a.csv": '\ufeffid,Prompt\r\n1,a cat\r\n\r\n2,"a dog, a ""red"" one"\r\n',
    "a.tsv": "Category\tprompt\nx\ta cat\ny\t\"a dog, a \"\"red\"\" one\"\n",
    "a.jsonl": '{"id": 1, "prompt": "a cat"}\n\n{"prompt": "a dog, a \\"red\\" one"}\n',
    "a.NDJSON": '{"PROMPT": "a cat"}\n{"PROMPT": "a dog, a \\"red\\" one"}',
    "a.txt": 'a cat\na dog, a "red" one\n',
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_prompts_are_read_by_column(tmp_path, name):
    path = written(tmp_path, name, TABLES[name])
    assert load_prompts(path) == ["a cat", 'a dog, a "red" one']


def test_another_column_is_read_by_its_name(tmp_path):
    table = written(tmp_path, "a.csv", "prompt,Caption,caption\na,b,c\n")
    assert load_prompts(table, "caption") == ["c"] and load_prompts(table) == ["a"]
    lines = written(tmp_path, "a.jsonl", '{"prompt": "a", "text": "b"}\n')
    assert load_prompts(lines, "text") == ["b"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "a cat\na dog\n", r"has 'a cat' in line 1, .* 'prompt'; .*--prompt-column.*\.txt"),
        ("a.csv", "\nid;prompt\n1;a\n", "has 'id;prompt' in line 2, and not one column 'prompt'"),
        ("a.csv", "prompt,prompt\na,b\n", "and not one column 'prompt'"),
        ("a.csv", "prompt,id\na\nb,2\n", "line 2 has 1 cells, the header 2; put texts with ','"),
        ("a.csv", 'prompt\na\n"b\n', "cannot be read from line 3 on: unexpected end"),
        ("a.csv", 'prompt\n"a\nb"\n"a\nb"\n', r"(?s)line 2 holds .* U\+000A.*line 4 holds"),
        ("a.csv", "id,prompt\n1,a\n2, \n3,a\n", r"(?s)line 3 has an empty.*line 4 repeats line 2"),
        ("a.csv", "prompt\n", "holds no prompts"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"}\n', "line 2 is no JSON"),
        ("a.jsonl", '"a cat"\n', r'line 1 is no JSON object; write \{"prompt": \.\.\.\}'),
        ("a.jsonl", '{"text": "a", "id": 1}\n', "line 1 has 'text', 'id', and not one 'prompt'"),
        ("a.jsonl", "\n{}\n", "line 2 has nothing, and not one 'prompt'"),
        ("a.jsonl", '{"prompt": ["a"]}\n', r"line 1 has \['a'\] as 'prompt', which is no text"),
        ("a.json", '["a cat",\n"a dog"]\n', r"a\.json has no columns; give .*\.jsonl"),
        ("a.txt", '\n{"prompt": "a"}\n', r"holds JSON lines \(\.jsonl\), as its line 2 says"),
        ("a.txt", "prompt,seed\na,1\n", r"holds CSV \(\.csv, \.tsv\), as its line 1 says"),
        ("a.txt", "a\n\u00a0\u3000\n", r"line 2 holds nothing to be seen \(U\+00A0, U\+3000\); write"),
        ("a.txt", "a\n\u200b\u2060\n", r"line 2 holds nothing to be seen \(U\+200B, U\+2060\)"),
        ("a.txt", "\u3164 \ufe0f\n", r"line 1 holds nothing to be seen \(U\+3164, U\+0020, U\+FE0F"),
        ("a.csv", "prompt,id\n\u00a0,1\n", "line 2 holds nothing to be seen"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_named(tmp_path, name, text, told):
    path = written(tmp_path, name, text)
    with pytest.raises(ValueError, match=told) as error:
        load_prompts(path)
    assert str(path) in str(error.value)


def test_a_file_without_columns_is_not_asked_for_one(tmp_path):
    for source in (written(tmp_path, "a.txt", "a cat\n"), "emoji"):
        with pytest.raises(ValueError, match=r"has no columns; give a file that ends in \.csv"):
            load_prompts(source, "prompt")


def test_what_can_be_seen_is_a_prompt(tmp_path):
    prompts = ["!", "👩‍🚀", "é", "\U000e0fff", "雨"]  # the fourth is unassigned
    assert load_prompts(written(tmp_path, "a.txt", "\n".join(prompts))) == prompts


# Pictures


@pytest.fixture
def real(tmp_path):
    folder = tmp_path / "real"
    folder.mkdir()
    for index in range(3):
        noise = np.random.default_rng(index).integers(0, 256, (24, 20, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
@pytest.mark.parametrize("left", [0, 3, 60, -40])
def test_a_truncated_picture_is_named(real, tmp_path, suffix, left):
    path = real / f"cut.{suffix}"
    with Image.open(real / "0.png") as image:
        image.save(path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=rf"cut\.{suffix} cannot be read \(.*\); replace it"):
        list(read_pictures(real, tmp_path).batches())


@pytest.mark.parametrize("suffix", ["tiff", "TIF", "gif", "heic", "avif", "jp2"])
def test_pictures_in_other_forms_are_named(real, tmp_path, suffix):
    for index in range(7):
        (real / f"more{index}.{suffix}").touch()
    told = rf"more0\.{suffix}, .* and 2 more, and only \.png, .* are read; convert or remove"
    with pytest.raises(ValueError, match=told):
        read_pictures(real, tmp_path)


def test_what_else_lies_beside_pictures_is_said(real, tmp_path):
    (real / ".hidden").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_pictures(real, tmp_path)) == 3
    (real / "cats").mkdir()
    (real / "labels.csv").touch()
    with pytest.warns(UserWarning, match=r"real holds cats, labels\.csv, which are passed over"):
        assert len(read_pictures(real, tmp_path)) == 3


def test_a_broken_array_is_named(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    for save, name in ((np.save, "a.npy"), (np.savez, "a.npz"), (np.savez_compressed, "b.npz")):
        path = tmp_path / name
        save(path, pictures)
        whole = path.read_bytes()
        middle = len(whole) // 2
        for data in (b"", b"none", whole[:middle], whole[:middle] + b"\0" * 60 + whole[middle:]):
            path.write_bytes(data)
            if name == "a.npy" and len(data) > len(whole):
                continue  # numpy does not look at what follows
            with pytest.raises(ValueError, match=rf"{name} cannot be read \(.*\); write it again"):
                read_pictures(path, tmp_path)
    with zipfile.ZipFile(tmp_path / "c.npz", "w"):
        pass
    with pytest.raises(ValueError, match=r"c\.npz has no arrays; call the pictures `images`"):
        read_pictures(tmp_path / "c.npz", tmp_path)
    np.save(tmp_path / "d.npy", pictures / 255)
    with pytest.raises(ValueError, match=r"d\.npy: an array of pictures is uint8 .* not float64"):
        read_pictures(tmp_path / "d.npy", tmp_path)


def test_broken_weights_of_features_are_named(tmp_path):
    for data in (b"", b"none"):
        path = tmp_path / "weights.pth"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"weights\.pth holds no weights of EfficientNet"):
            load_extractor(path=path)


# Settings


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("tofu", {"ratio": "half"}, "ratio must be a number, not 'half'"),
        ("tofu", {"speedup": [2.0]}, r"speedup must be a number, not \[2.0\]"),
        ("tofu", {"ratio": 0.5, "warmup_steps": "x"}, "warmup_steps must be a whole number, not 'x'"),
        ("tomesd", {"ratio": "half"}, "ratio must be a number, not 'half'"),
        ("fewer_steps", {"steps": "ten"}, "steps must be a whole number, not 'ten'"),
        ("fewer_steps", {"steps": 3, "scheduler": "Heun"}, "unknown scheduler 'Heun'; choose multi"),
        ("step_cache", {"total": 5, "computed": 2.5}, "computed must be a whole number, not 2.5"),
        ("pab", {"skip": True}, "skip must be a whole number, not True"),
        ("deepcache", {"interval": "a"}, "interval must be a whole number, not 'a'"),
        ("taylorseer", {"interval": None}, "interval must be a whole number, not None"),
        ("first_block_cache", {"threshold": "a"}, "threshold must be a number, not 'a'"),
        ("stack", {"of": "abc"}, "options of 'x', kind 'stack': .* must be a mapping, not str"),
    ],
)  # fmt: skip
def test_words_where_numbers_belong_are_named(kind, options, told):
    pipe = tiny.tiny_sd()
    with pytest.raises(ValueError, match=told), Setting("x", kind, options).applied(pipe):
        pass


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="name 3 may hold letters"):
        Setting.from_dict({"name": 3})


# The commands


def test_mistakes_end_with_words_before_anything_is_made(real, tmp_path, capsys):
    tiny.tiny_sd().save_pretrained(tmp_path / "model")
    prompts = written(tmp_path, "a.csv", "text\na cat\na dog\n")
    common = ["--pipeline", tmp_path / "model", "--steps", "2", "--out", tmp_path / "out"]
    word = json.dumps({"name": "half", "kind": "tofu", "options": {"ratio": "half"}})
    (real / "1.png").write_bytes((real / "1.png").read_bytes()[:-40])
    (tmp_path / "b.npz").write_bytes(b"PK")
    for words, told in (
        (["generate", "--prompts", prompts], "has 'text' in line 1"),
        (["generate", "--prompts", prompts, "--prompt-column", "text", "--setting", word], "ratio"),
        (["sweep", "-n", "2", "--real", real], "1.png cannot be read"),
        (["sweep", "-n", "2", "--real", tmp_path / "b.npz"], "b.npz cannot be read"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(word) for word in [*words, *common]])
        assert told in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
