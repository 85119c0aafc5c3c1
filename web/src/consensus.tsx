// The score that the people agree on: a third beside theirs, suggested from them, set by a person.
import { useSignal } from '@preact/signals'
import { enqueue, newUid } from './outbox'
import { complete, given, onGrid, shown } from './scores'
import { measures } from './state'
import type { ImageDetail, Item, Measure, Scores } from './types'
import { Button } from './ui'

/** The median of the people's scores on the measure's grid; null without any. */
export function median(m: Measure, people: { scores: Scores }[]): number | null {
  const values = people.map((p) => given(p.scores, m.key)).filter((v): v is number => v !== null).sort((a, b) => a - b)
  if (!values.length) return null
  const half = values.length / 2
  return onGrid(m, values.length % 2 ? values[Math.floor(half)]! : (values[half - 1]! + values[half]!) / 2)
}

export function ConsensusBox({ item, detail }: { item: Item; detail: ImageDetail }) {
  const chosen = useSignal<Scores>({})
  const people = detail.people
  if (people.length < 2 && !item.consensus) return null
  const suggested = Object.fromEntries(measures.value.map((m) => [m.key, given(item.consensus, m.key) ?? median(m, people)]))
  const scores = { ...suggested, ...chosen.value }
  const save = () => { enqueue({ kind: 'consensus', uid: newUid(), image: item.id, scores }); chosen.value = {} }
  return (
    <details class="consensus"><summary>Consensus{item.consensus ? ' (set)' : ''}</summary>
      <div class="consensus-fields">
        {measures.value.map((m) => (
          <label key={m.key}><span>{m.name}</span>
            <input type="number" min={m.low} max={m.high} step={m.step} value={scores[m.key] ?? ''}
              onChange={(e) => { chosen.value = { ...chosen.value, [m.key]: e.currentTarget.value === '' ? null : onGrid(m, Number(e.currentTarget.value)) } }} />
            <small>{people.map((p) => shown(given(p.scores, m.key), m)).join(' · ')}</small>
          </label>
        ))}
      </div>
      <Button icon="check" disabled={!complete(measures.value, scores)} onClick={save}>Save the consensus</Button>
    </details>
  )
}
