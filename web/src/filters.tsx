// Search and filters of the list; one state for the table and for the list beside the picture.
import { useRef } from 'preact/hooks'
import { anyQuery, type Query } from './api'
import { query, study } from './state'
import { Icon } from './ui'

export const set = (change: Partial<Query>) => { query.value = { ...query.value, ...change } }

export function Search({ label = 'Search' }: { label?: string }) {
  const timer = useRef<ReturnType<typeof setTimeout> | undefined>(undefined)
  const later = (text: string) => {
    clearTimeout(timer.current)
    timer.current = setTimeout(() => set({ search: text }), 180)
  }
  return (
    <label class="search"><Icon name="search" size={16} /><span class="hidden">{label}</span>
      <input type="search" placeholder={label} value={query.value.search} onInput={(e) => later(e.currentTarget.value)} />
    </label>
  )
}

function Toggle({ name, children }: { name: 'unscored' | 'far' | 'flagged'; children: string }) {
  const on = query.value[name]
  return <button type="button" class={`toggle ${on ? 'on' : ''}`} aria-pressed={on} onClick={() => set({ [name]: !on })}>{children}</button>
}

export function Quick() {
  return (
    <div class="quick"><Search label="Search pictures" />
      <div class="toggles"><Toggle name="unscored">Unscored</Toggle><Toggle name="far">Far from draft</Toggle><Toggle name="flagged">Flagged</Toggle></div>
    </div>
  )
}

function Choice({ label, name, all, options }: { label: string; name: 'group' | 'status' | 'scorer'; all: string; options: [string, string][] }) {
  return (
    <label class="choice"><span class="hidden">{label}</span>
      <select value={query.value[name]} aria-label={label} onChange={(e) => set({ [name]: e.currentTarget.value })}>
        <option value="">{all}</option>
        {options.map(([value, text]) => <option key={value} value={value}>{text}</option>)}
      </select>
    </label>
  )
}

export function Filters() {
  const s = study.value
  const changed = JSON.stringify({ ...query.value, sort: '', order: '' }) !== JSON.stringify({ ...anyQuery, sort: '', order: '' })
  return (
    <div class="filters" role="search">
      <Search label="Search name, serial or group" />
      <Choice label="Group" name="group" all="All groups" options={(s?.groups ?? []).map((g) => [g, g])} />
      <Choice label="State of the draft" name="status" all="Any state" options={[['Completed', 'Drafted'], ['Pending', 'Waiting'], ['Processing', 'In work'], ['Failed', 'Failed']]} />
      {(s?.scorers ?? []).length > 1 && <Choice label="Scored by" name="scorer" all="Scored by anyone" options={s!.scorers.map((p) => [String(p.id), p.name])} />}
      <div class="toggles"><Toggle name="unscored">Unscored by me</Toggle><Toggle name="far">Far from draft</Toggle><Toggle name="flagged">Flagged</Toggle></div>
      {changed && <button type="button" class="link" onClick={() => { query.value = { ...anyQuery, sort: query.value.sort, order: query.value.order } }}>Clear</button>}
    </div>
  )
}
