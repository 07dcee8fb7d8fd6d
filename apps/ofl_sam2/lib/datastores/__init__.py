"""Studies whose labels are journaled before they are written: a local folder, or a DICOMweb server."""
