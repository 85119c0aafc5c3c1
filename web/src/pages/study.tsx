// The study's settings, its model, its export.
import { useSignal } from '@preact/signals'
import { api } from '../api'
import { attempt, isAdmin, refreshList, say, study } from '../state'
import type { Measure, Study, StudyChange } from '../types'
import { Button, Field, Spinner, when } from '../ui'
import { ExportMenu } from '../export_menu'

const blank: Measure = { key: '', name: '', low: 0, high: 4, step: 1 }
const keyOf = (name: string) => name.toLowerCase().replace(/[^a-z0-9]+/g, '_').replace(/^[^a-z]+|_+$/g, '')

function Measures({ value, onChange }: { value: Measure[]; onChange: (m: Measure[]) => void }) {
  const put = (i: number, part: Partial<Measure>) => onChange(value.map((m, j) => (j === i ? { ...m, ...part } : m)))
  const isNew = (m: Measure) => !study.value?.measures.some((old) => old.key === m.key)
  return (
    <fieldset class="measures"><legend>Measures</legend>
      <div class="measure-line head" aria-hidden="true"><span>Name</span><span>Lowest</span><span>Highest</span><span>Step</span><span /></div>
      {value.map((m, i) => (
        <div class="measure-line" key={i}>
          <input aria-label={`Name of measure ${i + 1}`} required value={m.name}
            onInput={(e) => put(i, isNew(m) ? { name: e.currentTarget.value, key: keyOf(e.currentTarget.value) } : { name: e.currentTarget.value })} />
          {(['low', 'high', 'step'] as const).map((k) => (
            <input key={k} type="number" step="any" required aria-label={`${k} of ${m.name || `measure ${i + 1}`}`} value={m[k]}
              onInput={(e) => put(i, { [k]: Number(e.currentTarget.value) })} />
          ))}
          <Button look="quiet" icon="close" aria-label={`Take away ${m.name || `measure ${i + 1}`}`} onClick={() => onChange(value.filter((_, j) => j !== i))} />
        </div>
      ))}
      <Button look="quiet" icon="plus" onClick={() => onChange([...value, blank])}>A measure</Button>
    </fieldset>
  )
}

type Draft = Pick<Study, 'name' | 'measures' | 'blind_first' | 'serial_pattern' | 'serial_form' | 'consensus' | 'held_out'>
const draftOf = (s: Study): Draft => ({ name: s.name, measures: s.measures, blind_first: s.blind_first, serial_pattern: s.serial_pattern,
  serial_form: s.serial_form, consensus: s.consensus, held_out: s.held_out })

function Settings({ s }: { s: Study }) {
  const form = useSignal<Draft>(draftOf(s))
  const f = form.value
  const put = (part: Partial<Draft>) => { form.value = { ...form.value, ...part } }
  const changed = (Object.keys(f) as (keyof Draft)[]).filter((k) => JSON.stringify(f[k]) !== JSON.stringify(s[k]))
  const save = async (e: Event) => {
    e.preventDefault()
    const answer = await attempt(api.changeStudy(Object.fromEntries(changed.map((k) => [k, f[k]])) as StudyChange))
    if (!answer) return
    study.value = answer
    form.value = draftOf(answer)
    say('Settings saved.')
    refreshList()
  }
  return (
    <form class="card stack" onSubmit={save}>
      <fieldset class="stack plain" disabled={!isAdmin.value}>
        <Field label="Name of the study"><input required value={f.name} onInput={(e) => put({ name: e.currentTarget.value })} /></Field>
        <label class="check"><input type="checkbox" checked={f.blind_first} onChange={(e) => put({ blind_first: e.currentTarget.checked })} />
          <span><b>Blind first</b><small>The draft appears to a person only after that person has scored all measures of the picture.</small></span></label>
        <Measures value={f.measures} onChange={(measures) => put({ measures })} />
        <Field label="Pattern of file names" note="A regular expression with the named groups “group” and “number”; names that do not fit are listed, never dropped.">
          <input class="mono" required spellcheck={false} value={f.serial_pattern} onInput={(e) => put({ serial_pattern: e.currentTarget.value })} /></Field>
        <div class="row">
          <Field label="Form of serials"><select value={f.serial_form} onChange={(e) => put({ serial_form: e.currentTarget.value })}>
            <option value="lossless">S-3602-001 (lossless)</option><option value="published">S-3602-01 (as published)</option></select></Field>
          <Field label="Consensus"><select value={f.consensus} onChange={(e) => put({ consensus: e.currentTarget.value })}>
            <option value="median">median of the people</option><option value="mean">mean of the people</option><option value="agreed">only what was agreed</option></select></Field>
          <Field label="Held out for evaluation"><input type="number" min={0} max={0.9} step={0.05} value={f.held_out} onInput={(e) => put({ held_out: Number(e.currentTarget.value) })} /></Field>
        </div>
      </fieldset>
      {isAdmin.value && <div class="row end">
        <Button look="quiet" disabled={!changed.length} onClick={() => { form.value = draftOf(s) }}>Put back</Button>
        <Button look="main" type="submit" disabled={!changed.length}>Save the settings</Button></div>}
    </form>
  )
}

const number = (v: unknown) => (typeof v === 'number' && !Number.isInteger(v) ? v.toFixed(3) : String(v))

const countWord: Record<keyof Study['counts'], string> = { images: 'pictures', mine_complete: 'scored by me', consensus: 'with a consensus',
  flagged: 'flagged', changed: 'changed since scored', unmatched: 'with a name that does not fit', shared_serials: 'that share a serial',
  pending: 'waiting', processing: 'in work', completed: 'drafted', failed: 'failed' }
const always: string[] = ['images', 'mine_complete', 'completed']

function Model({ s }: { s: Study }) {
  if (!s.model) return (
    <div class="card"><p>This study has no model: scoring works without drafts.</p>
      <p>Give one with <code>histokit review STUDY --model FILE</code>, or train one of the study’s own scores: <code>histokit review train STUDY</code>.</p></div>
  )
  const metrics = Object.entries(s.model.metrics).filter(([, v]) => typeof v !== 'object')
  const earlier = s.models.filter((m) => !m.active)
  return (
    <div class="card"><p>Drafts come from model <b>{s.model.version}</b>, here since {when(s.model.created_at)}.</p>
      {metrics.length > 0 && <dl class="metrics">{metrics.map(([k, v]) => <div key={k}><dt>{k.replaceAll('_', ' ')}</dt><dd>{number(v)}</dd></div>)}</dl>}
      {earlier.length > 0 && <p class="quiet-text">Earlier models: {earlier.map((m) => m.version).join(', ')}</p>}</div>
  )
}

export function StudyPage() {
  const s = study.value
  if (!s) return <div class="page"><Spinner /></div>
  const counts = (Object.entries(s.counts) as [keyof Study['counts'], number][]).filter(([k, v]) => v > 0 || always.includes(k))
  return (
    <div class="page">
      <header class="page-head"><h1>Study</h1></header>
      <div class="tallies">{counts.map(([k, v]) => <span key={k}><b>{v}</b> {countWord[k]}</span>)}</div>
      <h2>Export</h2>
      <div class="card"><p>The whole study, with every name and time. The table of events (long) can be read back with <code>histokit review import</code>.</p><ExportMenu /></div>
      <h2>Model</h2><Model s={s} />
      <h2>Settings</h2><Settings s={s} key={JSON.stringify(draftOf(s))} />
    </div>
  )
}
