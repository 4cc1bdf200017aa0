"""
--dry_run: the first samples of one's own data with their pictures, as they would be stored, on a page that any browser
opens and that loads nothing.
"""


def write_page(name, path, image, notes, counts, samples):
    """
    Write out/own_<name>.html and return its path. image: ImageSettings; notes: lines about how it was understood;
    counts: {what: number}; samples: (split, Record)s, of which the first ten are shown, their Views with pictures.
    """
    raise NotImplementedError
