"""The errors that a user can meet. Each says the field, the value, the rule and the fix."""


class MegakdError(Exception):
    """Base of every error that is the user's to mend; the command line prints it without a traceback."""


class ConfigError(MegakdError, ValueError):
    """A setting that cannot be used, found before any process group is made.

    Args:
        field: dotted name of the setting, or the command-line option.
        value: what it was set to.
        rule: what it has to satisfy.
        fix: what to write instead.
    """

    def __init__(self, field: str, value: object, rule: str, fix: str):
        self.field, self.value, self.rule, self.fix = field, value, rule, fix
        super().__init__(f"{field} = {value!r}: {rule}. {fix}")


class DataError(MegakdError, ValueError):
    """A data file or row that cannot be used.

    Args:
        file: path of the file.
        line: line number from 1 (row number for Parquet), or None where the whole file is meant.
        field: the row's field, or None.
        problem: what is wrong.
        fix: what would be right.
    """

    def __init__(self, file: object, line: int | None, field: str | None, problem: str, fix: str):
        self.file, self.line, self.field = str(file), line, field
        place = str(file) + (f":{line}" if line is not None else "")
        super().__init__(f"{place}: {f'field {field!r}: ' if field else ''}{problem}. {fix}")


class ModelError(MegakdError, ValueError):
    """A model directory, tokenizer or checkpoint that cannot be used as asked."""


class LossInputError(MegakdError, ValueError):
    """Tensors that a loss cannot take: shapes that do not match, labels out of range, non-finite values."""
