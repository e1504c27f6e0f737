"""placeholder"""


def export_bundle(student, path):
    raise NotImplementedError
