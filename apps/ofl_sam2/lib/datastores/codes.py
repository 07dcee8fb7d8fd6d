"""Which standard code names a structure in DICOM."""

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

ANATOMY = Code("123037004", "SCT", "Anatomical Structure")
ABNORMAL = codes.SCT.MorphologicallyAbnormalStructure
_TISSUE = codes.SCT.Tissue
_SIDES = {"left": Code("7771000", "SCT", "Left"), "right": Code("24028007", "SCT", "Right")}
_ABNORMAL = {
    "cyst": codes.SCT.Cyst,
    "edema": codes.SCT.Edema,
    "lesion": codes.SCT.Lesion,
    "nodule": codes.SCT.Nodule,
    "tumor": codes.SCT.Neoplasm,
    "tumour": codes.SCT.Neoplasm,
}
_ANATOMY = {
    "adrenal gland": codes.SCT.AdrenalGland,
    "aorta": codes.SCT.Aorta,
    "bladder": codes.SCT.Bladder,
    "bone": codes.SCT.Bone,
    "brain": codes.SCT.Brain,
    "cerebellum": codes.SCT.Cerebellum,
    "colon": codes.SCT.Colon,
    "duodenum": codes.SCT.Duodenum,
    "esophagus": codes.SCT.Esophagus,
    "femur": codes.SCT.Femur,
    "gallbladder": codes.SCT.Gallbladder,
    "heart": codes.SCT.Heart,
    "hippocampus": codes.SCT.Hippocampus,
    "inferior vena cava": codes.SCT.InferiorVenaCava,
    "kidney": codes.SCT.Kidney,
    "left atrium": codes.SCT.LeftAtrium,
    "left ventricle": codes.SCT.LeftVentricle,
    "liver": codes.SCT.Liver,
    "lung": codes.SCT.Lung,
    "lv": codes.SCT.LeftVentricle,
    "muscle": codes.SCT.Muscle,
    "myocardium": Code("74281007", "SCT", "Myocardium"),
    "pancreas": codes.SCT.Pancreas,
    "prostate": codes.SCT.Prostate,
    "right atrium": codes.SCT.RightAtrium,
    "right ventricle": codes.SCT.RightVentricle,
    "rv": codes.SCT.RightVentricle,
    "spinal cord": codes.SCT.SpinalCord,
    "spleen": codes.SCT.Spleen,
    "stomach": codes.SCT.Stomach,
    "trachea": codes.SCT.Trachea,
    "uterus": codes.SCT.Uterus,
    "vertebra": codes.SCT.Vertebra,
}


def structure_codes(name: str) -> tuple[Code, Code, Code | None]:
    """Category, type and side of a structure; a name that is not known for sure is a tissue.

    Example:
        >>> [code.meaning for code in structure_codes("Left_Kidney")]
        ['Anatomical Structure', 'Kidney', 'Left']
    """
    words = name.casefold().replace("_", " ").replace("-", " ").split()
    whole = " ".join(words)
    if whole in _ABNORMAL:
        return ABNORMAL, _ABNORMAL[whole], None
    if whole in _ANATOMY:
        return ANATOMY, _ANATOMY[whole], None
    for side, code in _SIDES.items():
        rest = " ".join(word for word in words if word != side)
        if words.count(side) == 1 and rest in _ANATOMY:
            return ANATOMY, _ANATOMY[rest], code
    return ANATOMY, _TISSUE, None
