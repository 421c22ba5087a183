"""A module of HLO around hand-written instructions."""

from __future__ import annotations

SUM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}
"""


def module(entry: str, *others: str, devices: int = 8) -> str:
    body = "\n".join(f"  {line}" for line in entry.strip().splitlines())
    head = f"HloModule test, is_scheduled=true, num_partitions={devices}\n{SUM}"
    return head + "\n".join(others) + f"\nENTRY %main () -> f32[] {{\n{body}\n}}\n"
