"""Small DICOM series in any orientation."""

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

COLUMNS, ROWS = 12, 10
_OBLIQUE = np.linalg.qr(np.random.default_rng(7).normal(size=(3, 3)))[0]
ORIENTATIONS = {
    "axial": ([1, 0, 0], [0, 1, 0]),
    "axial, feet up": ([-1, 0, 0], [0, 1, 0]),
    "coronal": ([1, 0, 0], [0, 0, -1]),
    "sagittal": ([0, 1, 0], [0, 0, -1]),
    "oblique": (_OBLIQUE[0], _OBLIQUE[1]),
}


def make_series(
    modality: str = "CT", slices: int = 6, seed: int = 0, orientation: str = "oblique", tilt_mm: float = 0.0
) -> list[FileDataset]:
    """A series of 12 x 10 pixels of 0.9 x 0.7 mm every 2.5 mm, its instances in a random order.

    With `tilt_mm`, each slice lies that much lower in its plane than the one before, as with a tilted gantry.
    """
    row, column = (np.array(axis, float) for axis in ORIENTATIONS[orientation])
    study, uid, frame = generate_uid(), generate_uid(), generate_uid()
    instances = []
    for index in range(slices):
        instance = _instance(modality, index)
        instance.StudyInstanceUID, instance.SeriesInstanceUID, instance.FrameOfReferenceUID = study, uid, frame
        instance.ImageOrientationPatient = [round(float(value), 10) for value in (*row, *column)]
        position = 50 * row + (tilt_mm * index - 30) * column + 2.5 * index * np.cross(row, column)
        instance.ImagePositionPatient = [round(float(value), 8) for value in position]
        pixels = np.random.default_rng(seed + index).integers(0, 2000, (ROWS, COLUMNS), np.int16)
        instance.PixelData = pixels.tobytes()
        instances.append(instance)
    np.random.default_rng(seed).shuffle(instances)
    return instances


def _instance(modality: str, index: int) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = MRImageStorage if modality == "MR" else CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    instance = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    instance.is_little_endian, instance.is_implicit_VR = True, False
    instance.SOPClassUID, instance.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    instance.SpecificCharacterSet, instance.PatientName = "ISO_IR 100", "Müller^Test"
    instance.Modality, instance.PatientID = modality, "patient"
    instance.PatientBirthDate, instance.PatientSex, instance.AccessionNumber = "19700101", "O", "1"
    instance.StudyDate, instance.StudyTime, instance.StudyID = "20200101", "101010", "1"
    instance.ReferringPhysicianName, instance.Manufacturer, instance.PositionReferenceIndicator = "", "scanner", ""
    instance.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    instance.SeriesNumber, instance.InstanceNumber = 1, index + 1
    instance.Rows, instance.Columns, instance.PixelSpacing = ROWS, COLUMNS, [0.7, 0.9]
    instance.SliceThickness = 2.5
    instance.SamplesPerPixel, instance.PhotometricInterpretation = 1, "MONOCHROME2"
    instance.BitsAllocated = instance.BitsStored = 16
    instance.HighBit, instance.PixelRepresentation = 15, 1
    instance.RescaleSlope, instance.RescaleIntercept = 1, -1000
    return instance
