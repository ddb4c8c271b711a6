"""Draws a sequence of messages as SVG: `sequence.py docs/update.txt > docs/update.svg`. The text says how it is written."""

import html
import sys

WIDTH, LANE, STEP, TOP = 980, 260, 34, 56


def main():
    rows, lanes = [], []
    for line in open(sys.argv[1]):
        line = line.strip()
        if line.startswith("lanes:"):
            lanes = [lane.strip() for lane in line.removeprefix("lanes:").split("|")]
        elif line and not line.startswith("#"):
            head, words = line.split(": ", 1)
            rows.append((head.split(), words))
    height = TOP + STEP * len(rows) + 20
    x = [100 + LANE * number for number in range(len(lanes))]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        '<title>The way of an update</title>',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="9" markerHeight="9" markerUnits="userSpaceOnUse" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#345"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for at, lane in zip(x, lanes):
        out.append(f'<text x="{at}" y="24" text-anchor="middle" font-weight="bold" fill="#123">{html.escape(lane)}</text>')
        out.append(f'<line x1="{at}" y1="34" x2="{at}" y2="{height - 8}" stroke="#bcd"/>')
    for number, (head, words) in enumerate(rows):
        y, words = TOP + STEP * number + 14, html.escape(words)
        if len(head) == 1:
            at = x[int(head[0])]
            wide = 6.4 * len(words) + 16
            out.append(f'<rect x="{at - wide / 2:.0f}" y="{y - 15}" width="{wide:.0f}" height="22" rx="4" fill="#eef4fa" stroke="#9bc"/>')
            out.append(f'<text x="{at}" y="{y}" text-anchor="middle" fill="#123">{words}</text>')
            continue
        start, end = x[int(head[0])], x[int(head[2])]
        width = 3 if head[1] == "=>" else 1.2
        out.append(f'<line x1="{start}" y1="{y + 5}" x2="{end}" y2="{y + 5}" stroke="#345" stroke-width="{width}" marker-end="url(#head)"/>')
        out.append(f'<text x="{(start + end) / 2:.0f}" y="{y}" text-anchor="middle" fill="#123">{words}</text>')
    print("\n".join([*out, "</svg>"]))


if __name__ == "__main__":
    main()
