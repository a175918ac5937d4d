"""A PDF made in code: pages of text lines, an outline, nothing else."""


def make_pdf(pages: list[list[str]], outline: list[tuple[str, int]] = ()) -> bytes:
    """The bytes of a PDF with a page for each list of lines, and titles that lead to pages."""
    num_pages, num_titles = len(pages), len(outline)
    # Objects: 1 catalog, 2 page tree, 3 font, then page and content in turn, then the outline.
    first_title = 4 + 2 * num_pages + 1
    objects = [
        f"<< /Type /Catalog /Pages 2 0 R /Outlines {first_title - 1} 0 R >>",
        f"<< /Type /Pages /Count {num_pages} /Kids [{_references(4, num_pages, 2)}] >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, lines in enumerate(pages):
        moves = " ".join(f"({_escaped(line)}) Tj 0 -12 Td" for line in lines)
        content = f"BT /F1 10 Tf 50 750 Td {moves} ET"
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] "
            f"/Resources << /Font << /F1 3 0 R >> >> /Contents {5 + 2 * number} 0 R >>"
        )
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    last_title = first_title + num_titles - 1
    ends = f"/First {first_title} 0 R /Last {last_title} 0 R" if outline else ""
    objects.append(f"<< /Type /Outlines /Count {num_titles} {ends} >>")
    for number, (title, page) in enumerate(outline):
        own = first_title + number
        around = f"/Prev {own - 1} 0 R " if number else ""
        around += f"/Next {own + 1} 0 R " if own < last_title else ""
        objects.append(
            f"<< /Title ({_escaped(title)}) /Parent {first_title - 1} 0 R {around}"
            f"/Dest [{4 + 2 * page} 0 R /Fit] >>"
        )
    return _file(objects)


def _references(first: int, count: int, step: int) -> str:
    return " ".join(f"{first + step * number} 0 R" for number in range(count))


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")


def _file(objects: list[str]) -> bytes:
    content, starts = b"%PDF-1.4\n", []
    for number, value in enumerate(objects, start=1):
        starts.append(len(content))
        content += f"{number} 0 obj\n{value}\nendobj\n".encode("latin-1")
    table = "".join(f"{start:010d} 00000 n \n" for start in starts)
    size = len(objects) + 1
    trailer = f"trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(content)}\n%%EOF\n"
    return content + f"xref\n0 {size}\n0000000000 65535 f \n{table}{trailer}".encode()
