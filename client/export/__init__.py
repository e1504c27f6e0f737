"""Taking the student home: exports that were checked against it, and a model card beside them."""

from client.export.exporting import FORMATS, ExportRequest, export_student
from client.export.loading import load_runnable

__all__ = ["FORMATS", "ExportRequest", "export_student", "load_runnable"]
