"""The students: small networks that a hospital keeps and runs on any machine."""

from client.students.base import Student, StudentOutput
from client.students.catalogue import STUDENTS, build_student
from client.students.files import LoadedStudent, StudentCard, load_student, save_student
from client.students.unet import UNetXS

__all__ = [
    "STUDENTS",
    "LoadedStudent",
    "Student",
    "StudentCard",
    "StudentOutput",
    "UNetXS",
    "build_student",
    "load_student",
    "save_student",
]
