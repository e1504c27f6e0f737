"""Fundus photographs with vessels: DRIVE, CHASE_DB1, HRF, STARE, LES-AV.

Layouts: DRIVE as in the archive of its challenge, whose test half comes without ``1st_manual`` today and
came with ``1st_manual`` and ``2nd_manual`` before; CHASE_DB1 as in ``CHASEDB1.zip`` of Kingston
University; HRF as in ``all.zip`` of its page at Erlangen; STARE as in ``stare-images.tar`` and
``labels-ah.tar``, each in a folder of its name; LES-AV as in ``LES-AV.zip``. All five are known from the
listings and loaders of several public repositories, not from the archives themselves. Masks are grey
or black-and-white pictures of 0 and 255, the first observer's (CHASE_DB1: 1stHO; DRIVE: 1st_manual;
STARE: Adam Hoover's). Masks of the field of view are not read: `client.data` finds it in the photograph.
"""

from __future__ import annotations

from dataclasses import replace

from client.patients import Split
from client.preparation.known_set import Item, KnownSet, Terms
from client.preparation.pictures import read_binary, read_picture
from client.preparation.source import FileKind, Source
from common.recipe import ClassConfig

VESSEL = (ClassConfig(name="vessel", label=255, like="vessel"),)
CHASE_TRAINING_CHILDREN = 10  # of 14: most papers train on the first twenty images
HRF_GROUPS = {"dr": "diabetic retinopathy", "g": "glaucoma", "h": "healthy"}


def _kinds(
    image: tuple[str, str], mask: tuple[str, str], key: str, example: str
) -> tuple[FileKind, FileKind]:
    """Images and masks, each given as a folder and a name with ``{}`` for the key."""
    return FileKind(*image, key, example, read_picture), FileKind(*mask, key, example, read_binary)


DRIVE_TRAINING = _kinds(
    ("training/images", "{}_training.tif"), ("training/1st_manual", "{}_manual1.gif"), r"\d\d", "21"
)
DRIVE_TEST = _kinds(("test/images", "{}_test.tif"), ("test/1st_manual", "{}_manual1.gif"), r"\d\d", "01")
CHASE_IMAGE, CHASE_MASK = _kinds((".", "Image_{}.jpg"), (".", "Image_{}_1stHO.png"), r"\d\d[LR]", "01L")
SECOND_OBSERVER = r"Image_\d\d[LR]_2ndHO\.png"
HRF = _kinds(("images", "{}.jpg"), ("manual1", "{}.tif"), r"\d\d_(?:dr|g|h)", "01_dr")
STARE = _kinds(("stare-images", "{}.ppm.gz"), ("labels-ah", "{}.ah.ppm.gz"), r"im\d{4}", "im0001")
STARE_UNPACKED = _kinds(("stare-images", "{}.ppm"), ("labels-ah", "{}.ah.ppm"), r"im\d{4}", "im0001")
LES_AV = _kinds(("images", "{}.png"), ("vessel-segmentations", "{}.png"), r"\d+", "111")


def _find_drive(source: Source) -> list[Item]:
    source.step_into("DRIVE")
    training = source.pairs(*DRIVE_TRAINING)
    test = source.root / "test"
    if test.is_dir() and not (test / "1st_manual").is_dir() and not (test / "2nd_manual").is_dir():
        source.notes.append(
            "DRIVE's test half came without masks (as its challenge hands it out): its images are left out, "
            "and patients of the training half are dealt into train, val and test."
        )
        return [Item(key, key, image, mask) for key, image, mask in training]
    halves = (Split.train, training), (Split.test, source.pairs(*DRIVE_TEST))
    return [Item(key, key, image, mask, split) for split, half in halves for key, image, mask in half]


def _find_chase(source: Source) -> list[Item]:
    source.step_into("CHASEDB1", "CHASE_DB1")
    source.notes.append("the split is the customary one: children 01 to 10 train, 11 to 14 test.")
    items = []
    for key, image, mask in source.pairs(CHASE_IMAGE, replace(CHASE_MASK, beside=SECOND_OBSERVER)):
        split = Split.train if int(key[:2]) <= CHASE_TRAINING_CHILDREN else Split.test
        items.append(Item(f"Image_{key}", f"child-{key[:2]}", image, mask, split))
    return items


def _find_hrf(source: Source) -> list[Item]:
    source.step_into("all", "HRF")
    return [
        Item(key, key, image, mask, group=HRF_GROUPS[key.split("_")[1].lower()])
        for key, image, mask in source.pairs(*HRF)
    ]


def _find_stare(source: Source) -> list[Item]:
    source.step_into("STARE", "stare")
    unpacked = any(source.root.glob("stare-images/*.ppm")) or any(source.root.glob("labels-ah/*.ppm"))
    return [Item(key, key, *read) for key, *read in source.pairs(*(STARE_UNPACKED if unpacked else STARE))]


def _find_les_av(source: Source) -> list[Item]:
    source.step_into("LES-AV")
    return [Item(key, key, *read) for key, *read in source.pairs(*LES_AV)]


DRIVE_SET = KnownSet(
    "drive", "DRIVE: 40 fundus photographs of a diabetic screening, vessels",
    (
        "training/images/21_training.tif   training/1st_manual/21_manual1.gif",
        "test/images/01_test.tif           test/1st_manual/01_manual1.gif (if you have it)",
    ),
    "an image (one photograph a person: 40 drawn from 400 people)", True,
    Terms(
        "research and education",
        "Free for research and education by those who got it from its own site; no copying on, no "
        "redistribution, no unauthorised commercial use.",
        False,
        "Staal et al., IEEE Transactions on Medical Imaging 23(4), 501-509, 2004",
        "https://drive.grand-challenge.org/", "the set's page at the Image Sciences Institute, Utrecht",
    ),
    _find_drive, VESSEL, 40,
)  # fmt: skip
CHASE_SET = KnownSet(
    "chase_db1", "CHASE_DB1: 28 fundus photographs, both eyes of 14 children, vessels",
    ("Image_01L.jpg  Image_01L_1stHO.png  Image_01R.jpg  Image_01R_1stHO.png  (2ndHO is not read)",),
    "a child: both eyes stay together", True,
    Terms(
        "CC BY 4.0", "Any use, with a citation.", True,
        "Fraz et al., IEEE Transactions on Biomedical Engineering 59(9), 2538-2548, 2012",
        "https://researchdata.kingston.ac.uk/96/", "a public catalogue that names the set's page",
    ),
    _find_chase, VESSEL, 28,
)  # fmt: skip
HRF_SET = KnownSet(
    "hrf", "HRF: 45 large fundus photographs, healthy, diabetic retinopathy, glaucoma, vessels",
    ("images/01_dr.JPG  images/01_g.jpg  images/01_h.jpg  manual1/01_dr.tif ...",),
    "an image (its page does not tell whether two are of one person)", False,
    Terms(
        "CC BY 4.0", "Any use, with a citation.", True,
        "Budai et al., International Journal of Biomedical Imaging 2013, 154860",
        "https://www5.cs.fau.de/research/data/fundus-images/", "a public catalogue that names the set's page",
    ),
    _find_hrf, VESSEL, 45,
)  # fmt: skip
STARE_SET = KnownSet(
    "stare", "STARE: 20 fundus photographs, half of them with disease, vessels",
    ("stare-images/im0001.ppm.gz   labels-ah/im0001.ah.ppm.gz   (or unpacked: .ppm, .ah.ppm)",),
    "an image (the set does not tell whether two are of one person)", False,
    Terms(
        "none stated", "Handed out freely for research; no licence was found: ask before any other use.",
        None, "Hoover, Kouznetsova and Goldbaum, IEEE Transactions on Medical Imaging 19(3), 203-210, 2000",
        "https://cecas.clemson.edu/~ahoover/stare/", "no statement was found",
    ),
    _find_stare, VESSEL, 20,
)  # fmt: skip
LES_AV_SET = KnownSet(
    "les_av", "LES-AV: 22 fundus photographs with and without glaucoma, vessels",
    ("images/111.png   vessel-segmentations/111.png   (arteries-and-veins, masks: not read)",),
    "an image (whether two are of one person, only its table may tell, which is not read)", False,
    Terms(
        "research", "For academic, non-commercial use, as a public catalogue has it: read its page.", False,
        "Orlando et al., MICCAI 2018, LNCS 11071, 65-73",
        "https://figshare.com/articles/dataset/LES-AV_dataset/11857698", "a public catalogue, not its page",
    ),
    _find_les_av, VESSEL, 22,
)  # fmt: skip
