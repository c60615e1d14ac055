"""Give the teacher's states, live or from a cache on disk, or its written responses."""

from ..utils.lazy import public


__getattr__, __dir__, __all__ = public(
    __name__,
    cache="CachedTeacher TeacherCache open_cache",
    load="Teacher load_teacher_model",
    responses="write_responses",
    source="TeacherSource open_source",
)
