"""Sheets as files: xlsx and csv, written for annotators and read back as rows of cells."""

from __future__ import annotations

import csv
import io
import math
import unicodedata
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transllm_jax.disk import whole, write_bytes
from transllm_jax.errors import UserError
from transllm_jax.evaluation.people.sheet import BETTER, CODE, COMMENT, Form, Row, is_right_to_left, needs_mark

EXTENSIONS = (".xlsx", ".csv")

# A row of Excel is at most 409 points high, which is 22 lines of Thai: columns are as wide as their longest text needs.
_HIGHEST, _LINE, _LINES, _NARROWEST, _WIDEST = 409, 18, 20, 40, 110


def check_openpyxl() -> None:
    """Raises UserError if the library that writes and reads xlsx is not installed."""
    try:
        import openpyxl  # noqa: F401
    except ImportError:
        raise UserError("sheets need openpyxl, which is not installed: pip install 'transllm-jax[sheets]'") from None


def write_xlsx(path: Path, rows: Sequence[Row], form: Form) -> None:
    """Write a sheet. Texts are texts whatever they begin with, wrap, and run in the direction of their script."""
    from openpyxl import Workbook
    from openpyxl.styles import Alignment, Border, Font, PatternFill, Side
    from openpyxl.utils import get_column_letter
    from openpyxl.worksheet.datavalidation import DataValidation

    book = Workbook()
    sheet = book.active
    sheet.title = "answers"
    texts = [[row.code, *row.texts] for row in rows]
    for number, heading in enumerate(form.columns, 1):
        cell = sheet.cell(1, number, heading)
        cell.font = Font(bold=True)
        cell.alignment = Alignment(wrap_text=True, vertical="top")
    for line, values in enumerate(texts, 2):
        for number, value in enumerate(values, 1):
            cell = sheet.cell(line, number)
            cell.value = value
            # Else openpyxl makes a formula of what begins with "=", and Excel of such a text when it is edited.
            cell.data_type, cell.quotePrefix = "s", True
            order = 2 if is_right_to_left(value) else 1
            cell.alignment = Alignment(wrap_text=True, vertical="top", readingOrder=order)
        for number in range(len(values) + 1, len(form.columns) + 1):
            sheet.cell(line, number).alignment = Alignment(wrap_text=True, vertical="top")
        for number in range(1, len(form.columns) + 1):
            sheet.cell(line, number).border = Border(bottom=Side(style="thin", color="BBBBBB"))
    widths = [_width([values[number] for values in texts]) for number in (1, 2, 3)]
    for line, values in enumerate(texts, 2):
        # Programs do not fit the height of rows whose heights the file leaves out.
        lines = max(_lines(text, width) for text, width in zip(values[1:], widths, strict=True))
        sheet.row_dimensions[line].height = min(lines * _LINE + 6, _HIGHEST)
    last = max(len(rows) + 1, 2)
    for number, heading in enumerate(form.columns, 1):
        letter = get_column_letter(number)
        column = sheet.column_dimensions[letter]
        if number in (2, 3, 4):
            column.width = widths[number - 2]
        else:
            column.width = 30 if heading == COMMENT else 10 if heading == CODE else 14
        if heading not in (CODE, COMMENT) and number > 4:
            choices = form.choices if heading.startswith(BETTER) else range(1, (form.rating or 0) + 1)
            allowed = DataValidation(
                "list", formula1=f'"{",".join(map(str, choices))}"', allow_blank=True, showErrorMessage=True
            )
            allowed.error = f"Choose {', '.join(map(str, choices))}, or leave the cell empty."
            allowed.add(f"{letter}2:{letter}{last}")
            sheet.add_data_validation(allowed)
            for line in range(2, last + 1):
                sheet.cell(line, number).fill = PatternFill("solid", fgColor="FFF7DC")
    sheet.freeze_panes = "B2"
    sheet.page_setup.orientation, sheet.page_setup.fitToHeight = "landscape", 0
    sheet.sheet_properties.pageSetUpPr.fitToPage = True
    sheet.print_title_rows = "1:1"
    how = book.create_sheet("how to")
    how.column_dimensions["A"].width = 100
    cell = how.cell(1, 1)
    cell.value, cell.data_type = form.text, "s"
    order = 2 if is_right_to_left(form.text) else 1
    cell.alignment = Alignment(wrap_text=True, vertical="top", readingOrder=order)
    how.row_dimensions[1].height = min(_lines(form.text, 100) * _LINE + 6, _HIGHEST)
    sheet.row_dimensions[1].height = 2 * _LINE
    # A file says when it was made; nothing else differs between two files of the same rows.
    with whole(path) as partial:
        book.save(partial)


def _width(texts: Sequence[str]) -> float:
    """The width of a column in which each text fits, in letters."""
    return next(
        (width for width in range(_NARROWEST, _WIDEST, 5) if all(_lines(text, width) <= _LINES for text in texts)),
        _WIDEST,
    )


def _lines(text: str, width: float) -> int:
    """How many lines a text takes at a width; words that do not fit leave a tenth of each empty."""
    return sum(max(1, math.ceil(1.1 * _letters(line) / width)) for line in text.split("\n"))


def _letters(line: str) -> int:
    """The width of a line: vowels above and below letters take no place, Chinese letters two."""
    return sum(
        0
        if unicodedata.combining(letter) or unicodedata.category(letter) == "Mn"
        else 2
        if unicodedata.east_asian_width(letter) in "WF"
        else 1
        for letter in line
    )


def write_csv(path: Path, rows: Sequence[Row], form: Form) -> None:
    """Write a sheet, in UTF-8 with a byte order mark, by which Excel knows it.

    What a spreadsheet would make a formula, a number or a date of has an apostrophe before it.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(form.columns)
    for row in rows:
        values = [row.code, *(f"'{one}" if needs_mark(one) else one for one in row.texts)]
        writer.writerow([*values, *[""] * (len(form.columns) - len(values))])
    write_bytes(path, text.getvalue().encode("utf-8-sig"))


def read_sheet(path: Path, heading: str = CODE) -> list[tuple[int, list[Any]]]:
    """The rows of a sheet that are not empty, each with its number (from 1). A formula is a str that begins with "=".

    Of a workbook, the rows of its first sheet that has a cell `heading`. Raises UserError if the file cannot be read.
    """
    if path.suffix.lower() == ".csv":
        return _read_csv(path)
    if path.suffix.lower() == ".xlsx":
        return _read_xlsx(path, heading)
    raise UserError(f"{path} is no xlsx and no csv; save the sheet as one of these")


def _read_xlsx(path: Path, heading: str) -> list[tuple[int, list[Any]]]:
    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = load_workbook(path)
    except (zipfile.BadZipFile, InvalidFileException, KeyError, ValueError, OSError) as error:
        raise UserError(f"{path} is no xlsx that can be read ({error}); save it again as xlsx") from None
    found: list[tuple[int, list[Any]]] = []
    for sheet in book.worksheets:
        rows = [
            (number, [_formula(cell.value) for cell in row])
            for number, row in enumerate(sheet.iter_rows(), 1)
            if any(cell.value is not None for cell in row)
        ]
        found = found or rows
        if any(isinstance(value, str) and value.strip().casefold() == heading for _, row in rows for value in row):
            return rows
    return found


def _formula(value: Any) -> Any:
    """What a cell holds; formulas of ranges are objects of openpyxl, and become their text."""
    text = getattr(value, "text", None)
    return text if isinstance(text, str) else value


def _read_csv(path: Path) -> list[tuple[int, list[Any]]]:
    try:
        data = path.read_bytes()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it as xlsx, or as csv in UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    first = text.partition("\n")[0]
    # Spreadsheets of countries with decimal commas write semicolons; "Unicode text" has tabs.
    delimiter = max(",;\t", key=first.count)
    rows = enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), 1)
    try:
        return [(number, [value or None for value in row]) for number, row in rows if any(row)]
    except csv.Error as error:
        raise UserError(f"{path} is no csv ({error}); save the sheet again as csv or xlsx") from None
