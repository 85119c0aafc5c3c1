// One row a measure: the person's score on buttons, the draft marked beside it, the difference named.
import { useEffect, useRef } from 'preact/hooks'
import { allowed, grid, onGrid, shown, signed, stepped, wholes } from './scores'
import type { Measure } from './types'
import { Button } from './ui'

interface RowProps {
  measure: Measure
  value: number | null
  draft: number | null
  active: boolean
  disabled?: boolean
  onSet: (value: number | null) => void
  onActive: () => void
  stillActive: () => boolean            // now, not when the row was drawn
}

function Difference({ measure, value, draft }: { measure: Measure; value: number | null; draft: number | null }) {
  if (draft === null) return null
  const d = value === null ? 0 : value - draft
  const said = value === null ? '' : Math.abs(d) < 1e-9 ? 'as drafted' : signed(d, measure)
  return (
    <span class="draft">
      <span class="draft-value" title="What the model suggests">draft <b>{shown(draft, measure)}</b></span>
      {said && <span class={`difference ${Math.abs(d) < 1e-9 ? 'same' : d > 0 ? 'up' : 'down'}`}>{said}</span>}
    </span>
  )
}

/** The buttons of the grid (or of its whole numbers, with a fine stepper), as one radio group. */
export function ScoreRow({ measure: m, value, draft, active, disabled, onSet, onActive, stillActive }: RowProps) {
  const group = useRef<HTMLDivElement>(null)
  const all = grid(m)
  const options = all.length ? all : wholes(m)
  const fine = all.length === 0
  const nearest = options.length ? options.reduce((a, b) => (Math.abs(b - (value ?? m.low)) < Math.abs(a - (value ?? m.low)) ? b : a)) : null
  const focusable = value === null ? options[0] : nearest

  useEffect(() => {
    if (!active || !stillActive()) return      // another key came meanwhile: two rows must not fight for the focus
    const inside = group.current?.contains(document.activeElement)
    const elsewhere = document.activeElement && document.activeElement !== document.body && !document.activeElement.closest('.scores')
    if (!inside && !elsewhere) group.current?.querySelector<HTMLElement>('[tabindex="0"]')?.focus({ preventScroll: true })
  }, [active])

  return (
    <div class={`score ${active ? 'active' : ''} ${value === null ? 'open' : 'given'}`} onPointerDown={onActive} onFocusIn={onActive}>
      <div class="score-head">
        <span class="score-name" id={`name-${m.key}`}>{m.name}</span>
        <Difference measure={m} value={value} draft={draft} />
      </div>
      <div class="score-line">
        {options.length > 0 && (
          <div class="options" role="radiogroup" aria-labelledby={`name-${m.key}`} ref={group} data-measure={m.key}>
            {options.map((option) => {
              const on = value !== null && Math.abs(value - option) < 1e-9
              const near = fine && !on && value !== null && option === nearest
              const drafted = draft !== null && Math.abs(draft - option) < m.step / 2 + (fine ? 0.5 - m.step / 2 : 0) - 1e-9
              return (
                <button type="button" role="radio" key={option} aria-checked={on} disabled={disabled}
                  tabIndex={option === focusable ? 0 : -1} class={`option ${on ? 'on' : ''} ${near ? 'near' : ''} ${drafted ? 'drafted' : ''}`}
                  aria-label={`${m.name} ${shown(option)}${drafted ? ', draft' : ''}`} onClick={() => onSet(option)}>
                  {shown(option)}
                </button>
              )
            })}
          </div>
        )}
        {fine && <Stepper measure={m} value={value} draft={draft} disabled={disabled} onSet={onSet} />}
      </div>
    </div>
  )
}

function Stepper({ measure: m, value, draft, disabled, onSet }: Pick<RowProps, 'measure' | 'value' | 'draft' | 'disabled' | 'onSet'>) {
  const typed = (text: string, input: HTMLInputElement) => {
    if (text.trim() === '') return
    const v = Number(text.replace(',', '.'))
    if (Number.isFinite(v)) onSet(onGrid(m, v))
    input.value = value === null ? '' : shown(onGrid(m, v), m)
  }
  return (
    <div class="stepper">
      <Button icon="minus" aria-label={`${m.name} one step down`} disabled={disabled || value === m.low}
        onClick={() => onSet(stepped(m, value, -1, draft))} />
      <input type="text" inputMode="decimal" aria-label={`${m.name}, ${m.low} to ${m.high} in steps of ${m.step}`} disabled={disabled}
        value={value === null ? '' : shown(value, m)} placeholder="–"
        onKeyDown={(e) => { if (e.key === 'Enter') e.currentTarget.blur() }}
        onChange={(e) => typed(e.currentTarget.value, e.currentTarget)} />
      <Button icon="plus" aria-label={`${m.name} one step up`} disabled={disabled || !allowed(m, (value ?? m.low) + m.step)}
        onClick={() => onSet(stepped(m, value, 1, draft))} />
    </div>
  )
}
