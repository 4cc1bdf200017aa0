"""The large image sets: figures with their captions, and multiple choice over many modalities."""

from data import Record
from prepare.datasets import (CAPTION_QUESTION, HUB_IMAGE, NO_NAME, dataset, expect, find_folder,
                              lettered, open_zip, parse_json, place, read_csv, read_json_lines,
                              read_member, read_parquets, refuse_damage, require_columns, require_splits)


# ----------------------------------------------------------------------------- raw files

def read_arrow(path, form):
    """Yield the rows of a stream of arrow batches as dicts; the file is mapped, never loaded whole."""
    import pyarrow
    import pyarrow.ipc

    with (refuse_damage(path, "arrow file"), pyarrow.memory_map(str(path)) as file,
          pyarrow.ipc.open_stream(file) as stream):
        require_columns(path, stream.schema.names, form)
        for batch in stream:
            batch.validate(full=True)  # a wrong offset would end the process, not raise
            batch = batch.select(list(form))
            for start in range(0, len(batch), 32):  # as dicts, the images are copies in memory
                for row in batch.slice(start, 32).to_pylist():
                    yield expect(path, row, form)


# ----------------------------------------------------------------------------- captions

def read_hub_captions(raw):
    """(split, Record)s of the hub's caption parquets: data/<split>-*.parquet, one image a row."""
    form = {"image": HUB_IMAGE, "image_id": str, "caption": str}
    require_splits(raw / "data", "train", "validation", "test")
    for split in ("train", "validation", "test"):
        for number, row in enumerate(read_parquets(raw / "data", split, form)):
            name, image = row["image_id"] or f"{split}_{number:06d}", row["image"]
            yield split, Record(name, CAPTION_QUESTION, row["caption"], image["bytes"],
                                image["path"] or name)


@dataset(kind="captions", licence="CC-BY, CC-BY-NC or others, figure by figure (hub card: MIT)",
         access="open", megabytes=13400, page="https://huggingface.co/datasets/eltorio/ROCO-radiology",
         hub="eltorio/ROCO-radiology", hub_files=("data/*.parquet",),
         layouts=(("data/train-*.parquet", "data/validation-*.parquet", "data/test-*.parquet"),),
         counts={"train": 65423, "validation": 8175, "test": 8176})
def roco(raw):
    """ROCO (Pelka et al. 2018), its radiology figures, as the hub has them: 33 were lost."""
    yield from read_hub_captions(raw)


@dataset(only_by_name=True, kind="captions", licence="CC-BY-NC-SA-4.0", access="open", megabytes=18600,
         page="https://huggingface.co/datasets/eltorio/ROCOv2-radiology",
         hub="eltorio/ROCOv2-radiology", hub_files=("data/*.parquet",),
         layouts=(("data/train-*.parquet", "data/validation-*.parquet", "data/test-*.parquet"),),
         counts={"train": 59962, "validation": 9904, "test": 9927})
def roco_v2(raw):
    """ROCOv2 (Rückert et al. 2024), figures from articles under CC-BY and CC-BY-NC only."""
    yield from read_hub_captions(raw)


@dataset(kind="captions", licence="each article's own, none of them non-commercial", access="open",
         megabytes=23155, page="https://huggingface.co/datasets/axiong/pmc_oa",
         hub="axiong/pmc_oa", hub_files=("pmc_oa.jsonl", "images.zip"),
         layouts=(("pmc_oa.jsonl", "images.zip"),), counts={"train": 1646592})
def pmc_oa(raw):
    """PMC-OA (Lin et al. 2023), figures cut into their parts, each with its part of the caption."""
    with open_zip(raw / "images.zip") as archive:
        folder = find_folder(archive, "caption_T060_filtered_top4_sep_v0_subfigures/")
        for row in read_json_lines(raw / "pmc_oa.jsonl", ("image", "caption")):
            member = f"{folder}{row['image']}"
            yield "train", Record(row["image"], CAPTION_QUESTION, row["caption"],
                                  read_member(archive, member), member)


# ----------------------------------------------------------------------------- multiple choice

@dataset(kind="image questions", task="choices", licence="each source's own", access="open", megabytes=10700,
         page="https://huggingface.co/datasets/foreverbeliever/OmniMedVQA",
         hub="foreverbeliever/OmniMedVQA", hub_files=("OmniMedVQA.zip",),
         layouts=(("OmniMedVQA.zip",),), counts={"train": 88996},
         known_leaks=(("/OCT & X-Ray 2017/", "mendeley_cxray"), ("/CoronaHack/", "mendeley_cxray"),
                      ("/COVIDx CXR-4/", "cxr8")))
def omni_med_vqa(raw):
    """OmniMedVQA (Hu et al. 2024): the 42 sources that come with images; a benchmark, not split."""
    optional = dict.fromkeys(("option_B", "option_C", "option_D"))
    columns = ("question_id", "question_type", "question", "gt_answer", "image_path", "option_A",
               *optional)
    with open_zip(raw / "OmniMedVQA.zip") as archive:
        tables = "QA_information/Open-access/"
        root = find_folder(archive, f"OmniMedVQA/{tables}", tables).removesuffix(tables)
        for source in sorted(name for name in archive.namelist()
                             if name.startswith(root + tables) and name.endswith(".json")):
            where = f"{archive.filename}: {source!r}"
            for number, row in enumerate(parse_json(where, read_member(archive, source), [dict]), 1):
                row = expect(f"{where}: item {number}", optional | row, columns)
                options = [row[f"option_{letter}"].strip() for letter in "ABCD"]
                options = [option for option in options if option]
                right = place(row["gt_answer"].strip(), options)
                member = f"{root}{row['image_path'] or NO_NAME}"
                yield "train", lettered(row["question_id"], row["question"], options, right, type=row["question_type"],
                                        image=read_member(archive, member), image_name=member)


def read_pmc_vqa(raw, tables, images, label):
    """(split, Record)s of PMC-VQA's tables {split: name}; the column `label` has the right letter."""
    letters = ("A", "B", "C", "D")
    columns = ("Figure_path", "Question", *(f"Choice {letter}" for letter in letters), label)
    with open_zip(raw / images) as archive:
        folder = find_folder(archive, "figures/", "images/")
        for split, name in tables.items():
            for number, row in enumerate(read_csv(raw / name, columns)):
                options = [row[f"Choice {letter}"].strip().removeprefix(f"{letter}:").strip()
                           for letter in letters]  # " A:Focal uptake "
                right = place(row[label].strip(), letters)
                member = f"{folder}{row['Figure_path']}"
                yield split, lettered(f"{split}_{number:06d}", row["Question"], options, right,
                                      image=read_member(archive, member), image_name=member)


@dataset(kind="image questions", task="choices", licence="CC-BY-SA", access="open", megabytes=18940,
         page="https://huggingface.co/datasets/RadGenome/PMC-VQA", hub="RadGenome/PMC-VQA",
         hub_files=("train.csv", "test_clean.csv", "images.zip"),
         layouts=(("train.csv", "test_clean.csv", "images.zip"),),
         counts={"train": 176948, "test": 2000})
def pmc_vqa(raw):
    """PMC-VQA (Zhang et al. 2023), version 1: whole figures; test is what its authors checked."""
    yield from read_pmc_vqa(raw, {"train": "train.csv", "test": "test_clean.csv"}, "images.zip",
                            "Answer_label")


@dataset(only_by_name=True, kind="image questions", task="choices", licence="CC-BY-SA", access="open",
         megabytes=2280, page="https://huggingface.co/datasets/RadGenome/PMC-VQA", hub="RadGenome/PMC-VQA",
         hub_files=("train_2.csv", "test_2.csv", "images_2.zip"),
         layouts=(("train_2.csv", "test_2.csv", "images_2.zip"),),
         counts={"train": 152603, "test": 33430})
def pmc_vqa_v2(raw):
    """PMC-VQA (Zhang et al. 2023), version 2: figures of a single part."""
    yield from read_pmc_vqa(raw, {"train": "train_2.csv", "test": "test_2.csv"}, "images_2.zip",
                            "Answer")


@dataset(kind="image questions", task="choices", licence="CC-BY-SA-4.0 (images: each source's own)",
         access="open", megabytes=3574, page="https://huggingface.co/datasets/jnirschl/uBench",
         hub="jnirschl/uBench", hub_files=("perception/0.1.0/*.arrow",), counts={},
         revision="3f2c5b590bc7a208d5b60f3527ce4c76a331aa2b",
         layouts=(tuple(f"perception/0.1.0/ubench-test-{n:05d}-of-00007.arrow" for n in range(7)),))
def ubench(raw):
    """Micro-Bench (Lozano et al. 2024), microscopy, up to 6 questions an image; a benchmark, not split."""
    for path in sorted((raw / "perception/0.1.0").glob("ubench-test-*.arrow")):
        for row in read_arrow(path, {"image_id": str, "image": HUB_IMAGE, "questions": dict}):
            name, image = row["image_id"], row["image"]
            for key, asked in row["questions"].items():
                asked = expect(f"{path}: {key!r}", asked,
                               {"question": str, "options": [str], "answer": str})
                if asked["question"]:  # each image has all keys, if not a question for each
                    yield "train", lettered(f"{name}_{key}", asked["question"], asked["options"],
                                            place(asked["answer"], asked["options"]), type=key, image=image["bytes"],
                                            image_name=image["path"] or name or NO_NAME)
