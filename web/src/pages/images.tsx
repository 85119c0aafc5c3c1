// The whole study as a table: search, filters, sort; only the rows in sight are drawn.
import { thumb, type Query } from '../api'
import { Filters, set } from '../filters'
import { overlaid, overlaidFlag } from '../outbox'
import { idAt, known, listTrouble, loaded, total, want } from '../rows'
import { given, shown } from '../scores'
import { measures, query, study } from '../state'
import type { Item, Scores } from '../types'
import { Icon, when } from '../ui'
import { Virtual } from '../virtual'
import { ExportMenu } from '../export_menu'

const columns: [string, string, string][] = [   // title, sort key, class
  ['Picture', 'name', 'c-name'], ['Group', 'group', 'c-group'], ['Mine', '', 'c-mine'], ['Draft', '', 'c-draft'],
  ['Consensus', '', 'c-consensus'], ['Others', '', 'c-others'], ['Far', 'far', 'c-far'], ['State', 'status', 'c-state'],
  ['Added', 'created', 'c-added'],
]

function Sorter({ title, by }: { title: string; by: string }) {
  if (!by) return <span>{title}</span>
  const { sort, order } = query.value
  const on = sort === by
  const turn = () => set({ sort: by, order: on && order === 'asc' ? 'desc' : 'asc' } as Partial<Query>)
  return (
    <button type="button" class={`sorter ${on ? 'on' : ''}`} onClick={turn}
      aria-label={`Sort by ${title}${on ? (order === 'asc' ? ', now ascending' : ', now descending') : ''}`}>
      {title}{on && <span aria-hidden="true">{order === 'asc' ? ' ↑' : ' ↓'}</span>}
    </button>
  )
}

export function Digits({ scores, beside }: { scores: Scores | null; beside?: Scores | null }) {
  if (!scores || measures.value.every((m) => given(scores, m.key) === null)) return <span class="none">–</span>
  return (
    <span class="digits">
      {measures.value.map((m) => {
        const v = given(scores, m.key)
        const d = beside ? given(beside, m.key) : null
        const differs = v !== null && d !== null && Math.abs(v - d) > 1e-9
        return <span key={m.key} class={`digit ${differs ? (v! > d! ? 'up' : 'down') : ''}`} title={`${m.name}: ${shown(v, m)}`}>{shown(v, m)}</span>
      })}
    </span>
  )
}

const stateWord: Record<string, string> = { Pending: 'waiting', Processing: 'in work', Completed: 'drafted', Failed: 'failed' }

export function StateChip({ item }: { item: Item }) {
  if (!item.status) return <span class="none">–</span>
  return <span class={`state ${item.status}`} title={item.reason ?? undefined}>{stateWord[item.status]}</span>
}

function Row({ index }: { index: number }) {
  const id = idAt(index)
  const item = id === undefined ? null : known(id)
  if (!item) return <div class="image-row blank" role="listitem" />
  const mine = overlaid(item.id, item.mine ?? {})
  return (
    <div role="listitem" class={`image-row ${index % 2 ? 'odd' : ''}`}>
      <a class="c-thumb" href={`#/review/${item.id}`} tabIndex={-1} aria-hidden="true"><img src={thumb(item, 88)} alt="" width="44" height="44" loading="lazy" decoding="async" /></a>
      <span class="c-name"><a href={`#/review/${item.id}`}><b>{item.serial || item.name}</b></a><small title={item.name}>{item.name}</small></span>
      <span class="c-group">{item.group || '–'}</span>
      <span class="c-mine"><Digits scores={mine} beside={item.draft} /></span>
      <span class="c-draft">{item.draft_hidden ? <span class="none" title="Blind first: score it and the draft appears">hidden</span> : <Digits scores={item.draft} />}</span>
      <span class="c-consensus"><Digits scores={item.consensus} /></span>
      <span class="c-others">{item.others || '–'}</span>
      <span class="c-far">{item.far === null || item.far === undefined ? '–' : item.far.toFixed(1)}</span>
      <span class="c-state"><StateChip item={item} />
        {item.changed && <span class="state warn" title="Another picture came under this name">changed</span>}
        {overlaidFlag(item.id, item.flagged) && <span class="flagged"><Icon name="flag" size={14} /><span class="hidden">flagged</span></span>}</span>
      <span class="c-added">{when(item.created_at)}</span>
      <a class="c-more" href={`#/image/${item.id}`} aria-label={`Every change of ${item.serial || item.name}`} title="Every change"><Icon name="clock" size={16} /></a>
    </div>
  )
}

function Head() {
  return (
    <div class="image-head">
      <span class="c-thumb" />
      {columns.map(([title, by, c]) => <span key={title} class={c}><Sorter title={title} by={by} /></span>)}
      <span class="c-more" />
    </div>
  )
}

export function Images() {
  void loaded.value
  const all = study.value?.counts.images ?? total.value
  return (
    <div class="page wide images">
      <header class="page-head"><h1>Pictures</h1>
        <span class="count" role="status">{total.value === all ? `${all}` : `${total.value} of ${all}`}</span>
        <span class="spring" /><ExportMenu /></header>
      <Filters />
      {listTrouble.value && <p class="notice bad">{listTrouble.value}</p>}
      <div class="image-table">
        {total.value === 0 && loaded.value > 0
          ? <p class="nothing">{all ? 'No picture fits these filters.' : <>No pictures yet. <a href="#/upload">Add some.</a></>}</p>
          : <Virtual count={total.value} height={60} label="Pictures" onRange={want} head={<Head />} row={(i) => <Row key={i} index={i} />} />}
      </div>
    </div>
  )
}
