"""The students: small networks that a hospital keeps and runs on any machine."""

from client.students.base import Student, StudentOutput
from client.students.catalogue import STUDENTS, build_student, start_of
from client.students.files import LoadedStudent, StudentCard, load_student, save_student
from client.students.mobile import Mobile
from client.students.unet import ResidualUNet, UNetS, UNetXS
from client.students.vit import ViTTiny

__all__ = [
    "STUDENTS",
    "LoadedStudent",
    "Mobile",
    "ResidualUNet",
    "Student",
    "StudentCard",
    "StudentOutput",
    "UNetS",
    "UNetXS",
    "ViTTiny",
    "build_student",
    "load_student",
    "save_student",
    "start_of",
]
