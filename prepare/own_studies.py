"""
Studies of one's own with their reports: a folder each, or a csv.

    scans/ann/2019-05-01/1.dcm  2.dcm  report.txt   a folder a study, perhaps in one a patient
    scans/study_7/film.png  findings.txt  impression.txt
    reports.csv                                     study, image, findings, impression; perhaps patient, date, view
    reports.csv  projections.csv                    the same in two tables, joined by their study (as IU X-Ray's)
"""


def find_studies(path, columns=""):
    """The files that say what was reported of studies, of a folder or csv; [] where it is none of studies."""
    raise NotImplementedError


def read_studies(path, sources, pictures, report="both", columns=""):
    """
    The Own, of kind "reports", of what find_studies found. pictures: own_pictures.Pictures, which say when DICOM
    studies were made; report: as --report. Drafts name their pictures by their path; Record.id is a hash.
    Raises UserError.
    """
    raise NotImplementedError
