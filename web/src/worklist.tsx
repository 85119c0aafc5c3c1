// The narrow list beside the picture: where one is, what is scored, what is not.
import { api, thumb } from './api'
import { overlaid } from './outbox'
import { idAt, idAtRow, known, loaded, rowOf, total, want } from './rows'
import { complete, missing } from './scores'
import { itemOf, listOpen, measures } from './state'
import { Button, Icon } from './ui'
import { Virtual } from './virtual'
import { Quick } from './filters'

/** The image one row further in the list, or null at its end; by name where the list has not been read that far. */
export async function neighbour(id: number, by: 1 | -1): Promise<number | null> {
  const row = rowOf(id)
  if (row >= 0) return idAtRow(row + by)
  const next = await api.next(id, by > 0 ? 'next' : 'previous', 'any').catch(() => null)
  return next?.id ?? null
}

export function Progress({ id }: { id: number }) {
  const item = itemOf(id).value
  if (!item) return null
  const mine = overlaid(id, item.mine ?? {})
  const open = missing(measures.value, mine).length
  const of = measures.value.length
  const text = open === 0 ? 'scored' : open === of ? 'not scored' : `${of - open} of ${of}`
  return <span class={`progress ${open === 0 ? 'done' : open === of ? 'none' : 'part'}`}>{complete(measures.value, mine) && <Icon name="check" size={13} />}{text}</span>
}

function Row({ index, current }: { index: number; current: number }) {
  const id = idAt(index)
  const item = id === undefined ? null : known(id)
  if (!item) return <div class="work-row blank" role="listitem" />
  return (
    <div role="listitem" class="work-slot">
      <a class={`work-row ${item.id === current ? 'current' : ''}`} href={`#/review/${item.id}`} aria-current={item.id === current ? 'true' : undefined}>
        <img src={thumb(item, 88)} alt="" width="44" height="44" loading="lazy" decoding="async" />
        <span class="work-text"><b>{item.serial || item.name}</b><Progress id={item.id} /></span>
        {item.flagged && <span class="work-flag"><Icon name="flag" size={14} /><span class="hidden">flagged</span></span>}
      </a>
    </div>
  )
}

export function WorkList({ current }: { current: number }) {
  void loaded.value
  const row = rowOf(current)
  if (!listOpen.value) {
    return (
      <nav class="work closed" aria-label="Pictures">
        <Button look="quiet" icon="panel" aria-label="Show the list" title="Show the list" onClick={() => { listOpen.value = true }} />
      </nav>
    )
  }
  return (
    <nav class="work" aria-label="Pictures">
      <header class="work-head">
        <span>{row >= 0 ? `${row + 1} of ${total.value}` : `${total.value} pictures`}</span>
        <Button look="quiet" icon="panel" aria-label="Hide the list" title="Hide the list" onClick={() => { listOpen.value = false }} />
      </header>
      <Quick />
      <Virtual count={total.value} height={60} label="Pictures" follow={row} onRange={want} row={(i) => <Row key={i} index={i} current={current} />} />
    </nav>
  )
}
