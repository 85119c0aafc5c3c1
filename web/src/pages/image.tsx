// One picture with everything that was ever said about it, newest first.
import { useSignal } from '@preact/signals'
import { useEffect } from 'preact/hooks'
import { thumb } from '../api'
import { given, shown } from '../scores'
import { imageChanged, itemOf, measures, readImage } from '../state'
import type { ImageDetail, Measure, ScoreEvent, Scores } from '../types'
import { Chip, Empty, Icon, Spinner, when } from '../ui'
import { StateChip } from './images'

const kindWord: Record<ScoreEvent['kind'], string> = { score: 'score', draft: 'draft', consensus: 'consensus', undo: 'undo', flag: 'flag' }

function What({ event, measure }: { event: ScoreEvent; measure?: Measure }) {
  if (event.kind === 'flag') return <>{event.value ? 'flagged' : 'flag taken away'}</>
  return <>{measure?.name ?? event.measure ?? ''} <b>{event.value === null ? 'taken back' : shown(event.value, measure)}</b></>
}

function EventRow({ event }: { event: ScoreEvent }) {
  const measure = measures.value.find((m) => m.key === event.measure)
  return (
    <tr>
      <td class="nowrap">{when(event.at)}</td>
      <td>{event.user ?? (event.model_version ? `model ${event.model_version}` : 'model')}</td>
      <td><Chip tone={`kind-${event.kind}`}>{kindWord[event.kind] ?? event.kind}</Chip></td>
      <td><What event={event} measure={measure} /></td>
      <td>{event.kind === 'score' ? (event.draft_visible ? 'seen' : 'not seen') : ''}</td>
      <td class="number">{event.seconds !== null && event.seconds !== undefined ? `${event.seconds.toFixed(1)} s` : ''}</td>
    </tr>
  )
}

function Current({ d }: { d: ImageDetail }) {
  const rows: [string, Scores | null][] = [
    ...(d.draft ? [[`Draft${d.model_version ? ` (${d.model_version})` : ''}`, d.draft] as [string, Scores]] : []),
    ...d.people.map((p) => [p.name, p.scores] as [string, Scores]),
    ...(d.consensus ? [['Consensus', d.consensus] as [string, Scores]] : []),
  ]
  if (!rows.length) return <p class="none">No scores yet.</p>
  return (
    <div class="table-frame"><table class="table"><caption class="hidden">Scores as they stand</caption>
      <thead><tr><th scope="col">By</th>{measures.value.map((m) => <th scope="col" class="number" key={m.key}>{m.name}</th>)}</tr></thead>
      <tbody>{rows.map(([name, s]) => <tr key={name}><th scope="row">{name}</th>{measures.value.map((m) => <td class="number" key={m.key}>{shown(given(s, m.key), m)}</td>)}</tr>)}</tbody>
    </table></div>
  )
}

export function ImagePage({ id }: { id: number }) {
  const detail = useSignal<ImageDetail | null>(null)
  const wrong = useSignal('')
  const changed = imageChanged.value.id === id ? imageChanged.value.n : 0
  useEffect(() => {
    readImage(id).then((d) => { detail.value = d }).catch((e: Error) => { wrong.value = e.message })
  }, [id, changed])
  const d = detail.value
  if (wrong.value) return <div class="page narrow"><Empty title="This picture cannot be shown"><p>{wrong.value}</p></Empty></div>
  if (!d || d.id !== id) return <div class="page"><Spinner /></div>
  const item = itemOf(id).value ?? d
  return (
    <div class="page">
      <header class="page-head"><h1>{item.serial || item.name}</h1><StateChip item={item} /><span class="spring" />
        <a class="button main" href={`#/review/${id}`}><Icon name="review" /><span>Score it</span></a></header>
      <div class="image-facts">
        <img src={thumb(item, 320)} alt={`Tissue picture ${item.name}`} />
        <dl>
          <dt>File</dt><dd>{item.name}{!item.matched && <Chip tone="warn" title="The name does not fit the study’s pattern">name not recognised</Chip>}</dd>
          <dt>Group</dt><dd>{item.group || '–'}</dd>
          <dt>Size</dt><dd>{item.width && item.height ? `${item.width} × ${item.height} px` : '–'}</dd>
          <dt>Resolution</dt><dd>{item.um_per_px ? `${Number(item.um_per_px.toPrecision(3))} µm per pixel` : 'unknown'}</dd>
          <dt>Added</dt><dd>{when(item.created_at)}</dd>
          {item.reason && <><dt>Reason</dt><dd>{item.reason}</dd></>}
        </dl>
      </div>
      <h2>Scores as they stand</h2><Current d={d} />
      <h2>Every change <small>{d.events.length}</small></h2>
      <div class="table-frame"><table class="table events">
        <thead><tr><th scope="col">When</th><th scope="col">Who</th><th scope="col">Kind</th><th scope="col">What</th><th scope="col">Draft</th><th scope="col" class="number">Time taken</th></tr></thead>
        <tbody>{[...d.events].reverse().map((e) => <EventRow key={e.id} event={e} />)}</tbody>
      </table></div>
    </div>
  )
}
