// Arithmetic of an ordinal score on its grid: low, low + step, … high. No page, no network.
import type { Measure, Scores } from './types'

/** The value on the measure's grid that is nearest, inside its range. */
export function onGrid(m: Measure, value: number): number {
  const steps = Math.round((Math.min(m.high, Math.max(m.low, value)) - m.low) / m.step)
  const v = m.low + steps * m.step
  return Number((v > m.high + 1e-9 ? v - m.step : v).toFixed(6))
}

/** One step up or down from a value; from nothing, the draft's value or the middle is where it starts. */
export function stepped(m: Measure, value: number | null | undefined, direction: 1 | -1, start?: number | null): number {
  if (value === null || value === undefined) return onGrid(m, start ?? (m.low + m.high) / 2)
  return onGrid(m, value + direction * m.step)
}

/** Whether the value may be given: inside the range and on the grid. */
export function allowed(m: Measure, value: number): boolean {
  return value >= m.low - 1e-9 && value <= m.high + 1e-9 && Math.abs(onGrid(m, value) - value) < 1e-9
}

/** Every value of the grid, or nothing where there are more than `most`. */
export function grid(m: Measure, most = 11): number[] {
  const n = Math.round((m.high - m.low) / m.step) + 1
  return n > most ? [] : Array.from({ length: n }, (_, i) => onGrid(m, m.low + i * m.step))
}

/** The whole numbers of the range that lie on the grid: the buttons of a measure with fine steps. */
export function wholes(m: Measure, most = 11): number[] {
  const first = Math.ceil(m.low)
  const all = Array.from({ length: Math.max(0, Math.floor(m.high) - first + 1) }, (_, i) => first + i)
  const on = all.filter((v) => allowed(m, v))
  return on.length > most ? [] : on
}

/** The number as a person writes it: as many decimals as the step has. */
export function shown(value: number | null | undefined, m?: Measure): string {
  if (value === null || value === undefined) return '–'
  if (!m) return String(Number(value.toFixed(3)))
  const digits = (String(m.step).split('.')[1] ?? '').length
  return value.toFixed(Number.isInteger(value) && m.step >= 1 ? 0 : digits)
}

/** The difference with its sign, with a true minus. */
export function signed(difference: number, m?: Measure): string {
  const sign = difference > 0 ? '+' : difference < 0 ? '−' : '±'
  return sign + shown(Math.abs(difference), m)
}

export function given(scores: Scores | null | undefined, key: string): number | null {
  return scores?.[key] ?? null
}

export function missing(measures: Measure[], scores: Scores | null | undefined): Measure[] {
  return measures.filter((m) => given(scores, m.key) === null)
}

export const complete = (measures: Measure[], scores: Scores | null | undefined) =>
  measures.length > 0 && missing(measures, scores).length === 0
