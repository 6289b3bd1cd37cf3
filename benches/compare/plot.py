# SPDX-License-Identifier: Apache-2.0
"""A drawing of the results: requests a second of each row, as a ratio to the peer's."""

from xml.sax.saxutils import escape

from rows import CPU, REQUESTS

COLOURS = {"ours": "#2266aa", "peer": "#b0b0b0", "limit": "#88aa44", "no record": "#77aadd"}
ROW_HEIGHT, BAR_HEIGHT, LABEL_WIDTH, BAR_WIDTH, MARGIN = 62, 14, 300, 420, 20


def svg(results):
    """The drawing, of the rows that have a peer to compare with."""
    results = [result for result in results if {"peer", "ours"} <= set(result.servers())]
    ratios = [
        result.median(name, REQUESTS) / result.median("peer", REQUESTS)
        for result in results
        for name in result.servers()
        if name in COLOURS
    ]
    scale = BAR_WIDTH / max([1.0, *ratios])
    width = LABEL_WIDTH + BAR_WIDTH + 190
    height = 2 * MARGIN + ROW_HEIGHT * len(results)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, result in enumerate(results):
        top = MARGIN + number * ROW_HEIGHT
        parts.append(f'<text x="{MARGIN}" y="{top + 24}">{escape(result.row.name)}</text>')
        names = [name for name in COLOURS if name in result.servers()][:3]
        for place, name in enumerate(names):
            ratio = result.median(name, REQUESTS) / result.median("peer", REQUESTS)
            y = top + place * (BAR_HEIGHT + 2)
            cpu = result.median(name, CPU)
            text = f"{name}: {ratio:.2f}x, {cpu:.1f} us CPU"
            parts.append(
                f'<rect x="{LABEL_WIDTH}" y="{y}" width="{ratio * scale:.1f}"'
                f' height="{BAR_HEIGHT}" fill="{COLOURS[name]}"/>'
                f'<text x="{LABEL_WIDTH + ratio * scale + 6:.1f}" y="{y + 12}">{text}</text>'
            )
    return "\n".join([*parts, "</svg>\n"])
