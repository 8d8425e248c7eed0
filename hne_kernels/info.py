"""`python -m hne_kernels.info` prints versions, build, machine and backends."""

from __future__ import annotations

from .environment import environment_report


def main() -> None:
    sections = environment_report()
    width = max(len(name) for _, rows in sections for name in rows)
    blocks = [
        "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())]) for title, rows in sections
    ]
    print("\n\n".join(blocks))


if __name__ == "__main__":
    main()
